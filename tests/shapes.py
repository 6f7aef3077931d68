"""Run code and compare every comment `name = ...  # (B, T, D)` with the tensor of that name."""

import ast
import io
import re
import sys
import threading
import tokenize
from pathlib import Path

SHAPE = re.compile(r"#\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")


def claims(path: Path) -> dict[int, tuple[int, str, list[str]]]:
    """First line of each commented assignment -> its last line, the name, the sizes."""
    source = path.read_text(encoding="utf-8")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (match := SHAPE.match(token.string)):
            comments[token.start[0]] = [s.strip() for s in match[1].split(",") if s.strip()]
    result = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and node.end_lineno in comments:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                result[node.lineno] = (node.end_lineno, target.id, comments[node.end_lineno])
    return result


def words_of(size: str) -> set[str]:
    """Letters and names in a size: "2S" has S, "T - 1" has T."""
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"(\d)([A-Za-z])", r"\1*\2", size)))


class Checker:
    """A tracer. Letters in `fixed` have one value for the run, others one value for each call."""

    def __init__(self, paths, fixed: dict[str, int]):
        self.claims = {str(path.resolve()): claims(path) for path in paths}
        self.fixed, self.wrong, self.seen = fixed, [], set()

    def value(self, size: str, letters: dict, actual: int):
        """Return the number for a size in a comment. A new letter gets the actual size."""
        unknown = words_of(size) - letters.keys()
        if unknown == {size}:
            letters[size] = actual
        elif unknown:
            return None  # an expression with an unknown letter cannot be checked
        return eval(re.sub(r"(\d)([A-Za-z])", r"\1*\2", size), {}, letters)

    def compare(self, frame, line: int, letters: dict):
        """Compare the comment on a line with the tensor, after the line was executed."""
        path = frame.f_code.co_filename
        _, name, sizes = self.claims[path][line]
        tensor = frame.f_locals.get(name)
        if not hasattr(tensor, "shape"):
            return
        integers = {k: v for k, v in frame.f_locals.items() if isinstance(v, int)}
        letters |= {k: v for k, v in integers.items() if k not in self.fixed}
        pairs = list(zip(sizes, tensor.shape, strict=False))
        expected = [self.value(size, letters, actual) for size, actual in pairs]
        equal = [value in (None, actual) for value, (_, actual) in zip(expected, pairs)]
        self.seen.add((Path(path).name, line))
        if len(sizes) != tensor.dim() or not all(equal):
            self.wrong.append(
                f"{Path(path).name}:{line} says {name} is ({', '.join(sizes)}) = {expected}, "
                f"but it is {tuple(tensor.shape)}"
            )

    def __call__(self, frame, event, arg):
        """The trace function of Python: it follows calls only into the checked files."""
        lines = self.claims.get(frame.f_code.co_filename)
        if not lines:
            return None
        letters, open_line = dict(self.fixed), None

        def follow(frame, event, arg):
            nonlocal open_line
            if open_line and (
                event == "return" or not open_line <= frame.f_lineno <= lines[open_line][0]
            ):
                self.compare(frame, open_line, letters)
                open_line = None
            if event == "line" and frame.f_lineno in lines:
                open_line = frame.f_lineno
            return follow

        return follow

    def run(self, work):
        """Call `work` and check what it executes."""
        before = sys.gettrace()
        sys.settrace(self)
        threading.settrace(self)  # sound files are read in a thread
        try:
            work()
        finally:
            sys.settrace(before)
            threading.settrace(None)
