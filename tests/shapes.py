"""Run code and hold every `name = ...  # (B, T, D)` comment against the live tensor."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

NOTE = re.compile(r"#\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")


def claims(path: Path) -> dict[int, tuple[int, str, list[str]]]:
    """First line of each commented assignment -> its last line, the name, the sizes claimed."""
    source = path.read_text()
    notes = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (found := NOTE.match(token.string)):
            notes[token.start[0]] = [size.strip() for size in found[1].split(",") if size.strip()]
    result = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and node.end_lineno in notes:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                result[node.lineno] = (node.end_lineno, target.id, notes[node.end_lineno])
    return result


class Checker:
    """A tracer. Letters in `known` are fixed for the run; the others hold within one call."""

    def __init__(self, paths, known: dict[str, int]):
        self.claims = {str(path.resolve()): claims(path) for path in paths}
        self.known, self.wrong, self.seen = known, [], set()

    def value(self, size: str, letters: dict, actual: int):
        """What a claimed size means here; a letter met for the first time means what it meets."""
        size = re.sub(r"(\d)([A-Za-z])", r"\1*\2", size)
        names = set(re.findall(r"[A-Za-z_]\w*", size))
        unknown = names - letters.keys()
        if unknown and size == next(iter(unknown)):
            letters[size] = actual
        elif unknown:
            return None  # an expression of something that nothing has fixed yet: not decidable
        return eval(size, {}, letters)

    def compare(self, frame, line: int, letters: dict):
        path = frame.f_code.co_filename
        _, name, sizes = self.claims[path][line]
        tensor = frame.f_locals.get(name)
        if not hasattr(tensor, "shape"):
            return
        here = {k: v for k, v in frame.f_locals.items() if isinstance(v, int)}
        letters |= {k: v for k, v in here.items() if k.isidentifier() and k not in self.known}
        want = [
            self.value(size, letters, actual)
            for size, actual in zip(sizes, tensor.shape, strict=False)
        ]
        self.seen.add((Path(path).name, line))
        decided = [w is None or w == a for w, a in zip(want, tensor.shape, strict=False)]
        if len(sizes) != tensor.dim() or not all(decided):
            self.wrong.append(
                f"{Path(path).name}:{line} says {name} is ({', '.join(sizes)}) = {want}, "
                f"it is {tuple(tensor.shape)}"
            )

    def __call__(self, frame, event, arg):
        """The global trace function: follow calls into the watched files only."""
        here = self.claims.get(frame.f_code.co_filename)
        if not here:
            return None
        letters, pending = dict(self.known), [None]

        def follow(frame, event, arg):
            line = pending[0]
            if line and (event == "return" or not line <= frame.f_lineno <= here[line][0]):
                self.compare(frame, line, letters)
                pending[0] = None
            if event == "line" and frame.f_lineno in here:
                pending[0] = frame.f_lineno
            return follow

        return follow

    def run(self, work):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)
