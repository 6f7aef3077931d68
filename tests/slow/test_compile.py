"""--compile with generated C++ code. This takes minutes, so it is not part of `pytest`."""

import shutil
from dataclasses import replace

import pytest
import torch

import train
from data import read_corpus
from llast import LLaST
from translate import SearchOptions, translate

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")


@pytest.fixture
def pair():
    """The included models with few layers, twice. The second is compiled."""
    if not shutil.which("g++"):
        pytest.skip("compiling for a CPU needs g++")
    settings, models = train.PRESETS["tiny"], []
    for _ in range(2):
        torch.manual_seed(0)
        model = LLaST.fresh(train.model_config(settings))
        del model.speech_encoder.layers[1:]  # compiling takes seconds a layer
        del model.llm.model.layers[2:]  # one of all positions, and the last
        for tensor in model.trained().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
        models.append(model)
    models[1].compile_layers()
    assert models[1].speech_encoder.layers[0]._compiled_call_impl is not None
    assert models[1].llm.model.layers[0]._compiled_call_impl is not None
    rows = read_corpus(settings.data, "fr", "en")[0]["dev"]
    return *models, rows[:12]


def test_compiled_layers_give_the_same_loss_and_gradients(pair):
    """Within 1e-4, because sums are computed in another order."""
    *models, rows = pair
    results = []
    for model in models:
        model.llm.recompute = True  # large models need both
        batches = train.make_batches(
            model, rows, replace(train.PRESETS["tiny"], asr=0.5, batch=600)
        )
        losses = torch.cat([model.train()(batches.load(group)) for group in batches.groups(0)])
        losses.sum().backward()
        results.append((losses, [p.grad for p in model.parameters() if p.requires_grad]))
    (loss, plain), (again, compiled) = results
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-4)
    for before, after in zip(plain, compiled, strict=True):
        assert before.any() and (before - after).norm() <= 1e-4 * before.norm()


def test_compiled_layers_find_the_same_answers(pair):
    *models, rows = pair
    paths = [row.path for row in rows]
    search = SearchOptions(max_new_tokens=9)
    plain, compiled = (translate(model.eval(), paths, search=search) for model in models)
    assert [result.text for result in plain] == [result.text for result in compiled]
    assert [result.score for result in compiled] == pytest.approx(
        [result.score for result in plain], abs=2e-4
    )
