"""Lessons: the right tokens, the right gradient, resumed where they stopped, whole or not at all."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference import tuning
from reference.adapters import WEIGHTS, AdapterError, read_card
from reference.lora import LessonLoss
from reference.model import LanguageModel, Prompt
from reference.packing import IGNORED, Lesson
from reference.tuning import Example, Recipe, TuningError, encode, lora_network, steps_of, train

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    Example(
        ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {n} plus one?"}), f"It is {n + 1}."
    )
    for n in range(12)
]
QUICK = Recipe(rank=4, epochs=2, batch=4, learning_rate=5e-3)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_an_example_is_encoded_as_generation_will_see_it_and_ends_with_one_end_token(tiny_model):
    e = encode(tiny_model, EXAMPLES[3])
    prompt = tiny_model.chat(list(EXAMPLES[3].messages))
    assert list(e.shared) == tiny_model.encode(prompt.shared) and list(e.prompt) == tiny_model.encode(prompt.own)
    assert tiny_model.tokenizer.decode(e.answer) == "It is 4." + tiny_model.tokenizer.eos_token
    assert [token in tiny_model.end_tokens for token in e.answer] == [False] * (len(e.answer) - 1) + [True]


def test_a_control_token_inside_an_answer_never_ends_it(tiny_model):
    e = encode(tiny_model, replace(EXAMPLES[0], answer="Stop <|im_end|> here"))
    assert sum(token in tiny_model.end_tokens for token in e.answer) == 1


def test_bad_examples_are_one_clear_line(tiny_model):
    with pytest.raises(TuningError, match="empty answer"):
        encode(tiny_model, replace(EXAMPLES[0], answer=""))
    with pytest.raises(TuningError, match="tokens long"):
        encode(tiny_model, replace(EXAMPLES[0], answer="word " * 3000))
    with pytest.raises(TuningError, match="no examples"):
        train([], "nowhere")


def test_every_epoch_has_every_example_once_in_another_order_and_the_seed_decides(tiny_model):
    encoded = [encode(tiny_model, e) for e in EXAMPLES]
    steps = steps_of(encoded, replace(QUICK, batch=5))
    assert [len(step) for step in steps].count(2) == 2 and len(steps) == 6
    first, second = [[e for step in part for e in step] for part in (steps[:3], steps[3:])]
    assert set(first) == set(second) == set(encoded) and first != second
    assert steps == steps_of(encoded, replace(QUICK, batch=5)) != steps_of(encoded, replace(QUICK, batch=5, seed=1))


def test_a_step_holds_examples_with_one_shared_beginning(tiny_model):
    other = [replace(e, messages=({"role": "system", "content": "Be long."}, e.messages[1])) for e in EXAMPLES]
    steps = steps_of([encode(tiny_model, e) for e in [*EXAMPLES, *other]], QUICK)
    assert all(len({e.shared for e in step}) == 1 for step in steps)


# --- loss and gradient ------------------------------------------------------------------------------------------------


def network_with_noise(model):
    """LoRA layers that already do something, the same ones each time."""
    network = lora_network(model, QUICK)
    torch.manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return network


def gradient(network):
    return torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])


def test_the_loss_is_on_the_answers_only(tiny_model):
    e = encode(tiny_model, EXAMPLES[0])
    lesson = Lesson.of(e.shared, [(e.prompt, e.answer)] * 2)
    trained = lesson.targets[lesson.targets != IGNORED].tolist()
    assert trained == [*e.answer, *e.answer] and lesson.answer_tokens == len(trained)
    assert lesson.tokens.shape == (1, len(e.shared) + 2 * (len(e.prompt) + len(e.answer)))


@pytest.mark.parametrize("fast", [True, False])
def test_a_lesson_has_exactly_the_loss_and_gradient_of_its_examples_alone(tiny, fast):
    model = LanguageModel.load()
    encoded = [
        encode(model, e)
        for e in (EXAMPLES[0], replace(EXAMPLES[1], answer="A much longer answer than the others have."), EXAMPLES[2])
    ]
    network = network_with_noise(model)
    loss = LessonLoss(network, fast)
    assert loss.fast == fast, "the tiny model is a Llama, which is taught by hand"
    together = loss(Lesson.of(encoded[0].shared, [(e.prompt, e.answer) for e in encoded]))
    together.backward()
    mine = gradient(network)

    plain = LanguageModel.load()
    network = network_with_noise(plain)
    plain.network.set_attn_implementation("sdpa")
    alone = 0.0
    for e in encoded:
        tokens = torch.tensor([[*e.shared, *e.prompt, *e.answer]])
        labels = tokens.clone()
        labels[0, : len(e.shared) + len(e.prompt)] = -100
        loss = network(input_ids=tokens, labels=labels).loss * len(e.answer)
        loss.backward()
        alone += loss.item()
    assert together.item() == pytest.approx(alone, rel=1e-5)
    assert torch.allclose(mine, gradient(network), rtol=1e-3, atol=1e-5)


def test_nothing_but_the_adapter_learns(tiny, tmp_path):
    model = LanguageModel.load()
    network = lora_network(model, QUICK)
    learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert {weight.dtype for name, weight in network.named_parameters() if name in learning} == {torch.float32}


# --- a whole lesson ---------------------------------------------------------------------------------------------------


def test_a_lesson_lowers_the_loss_and_leaves_an_adapter_with_its_card(tiny, tmp_path):
    seen = []
    card = train(EXAMPLES, tmp_path / "sums", replace(QUICK, epochs=20), {"sums.jsonl": "00"}, progress=seen.append)
    assert seen[-1].loss < 0.95 * seen[0].loss and seen[-1].step == seen[-1].steps == 60 and seen[-1].seconds_left == 0
    assert read_card(tmp_path / "sums", LanguageModel.load().id) == card
    assert card.examples == 12 and card.recipe["rank"] == 4 and card.tokens > 0 and card.data == {"sums.jsonl": "00"}
    assert {w.dtype for w in load_file(tmp_path / "sums" / WEIGHTS).values()} == {torch.bfloat16}
    assert [p.name for p in tmp_path.iterdir()] == ["sums"]
    assert not [p.name for p in (tmp_path / "sums").glob("*.json") if str(tiny) in p.read_text()]  # no path of this machine


def test_the_adapter_is_refused_on_another_base(tiny, tmp_path, model):
    train(EXAMPLES[:4], tmp_path / "sums", QUICK)
    with pytest.raises(AdapterError, match="trained on"):
        read_card(tmp_path / "sums", model.id)


class Stop(Exception):
    pass


def test_an_interrupted_lesson_goes_on_and_ends_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CHECKPOINT_SECONDS", 0)
    train(EXAMPLES, tmp_path / "straight", QUICK)

    def stop(progress):
        if progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(EXAMPLES, tmp_path / "broken", QUICK, progress=stop)
    assert not (tmp_path / "broken").exists()
    steps = []
    train(EXAMPLES, tmp_path / "broken", QUICK, progress=lambda p: steps.append(p.step))
    assert steps[0] == 4  # the step during which it was stopped was not saved yet
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("straight", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_lesson_is_not_taken_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Stop):
        train(EXAMPLES, tmp_path / "a", QUICK, progress=lambda p: (_ for _ in ()).throw(Stop()) if p.step == 3 else None)
    steps = []
    train(EXAMPLES, tmp_path / "a", replace(QUICK, seed=5), progress=lambda p: steps.append(p.step))
    assert steps[0] == 1


def test_an_adapter_that_is_there_is_never_overwritten(tiny, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(TuningError, match="is there already"):
        train(EXAMPLES, tmp_path / "a", QUICK)


def test_milestones_leave_the_adapter_as_it_was_then(tiny, tmp_path):
    train(EXAMPLES, tmp_path / "a", QUICK, milestones=[2])
    assert read_card(tmp_path / "a-2", LanguageModel.load().id).recipe["steps"] == 2
    early, late = (load_file(tmp_path / name / WEIGHTS) for name in ("a-2", "a"))
    assert any(not torch.equal(early[name], late[name]) for name in early)


TWO = """
import json, sys
import torch
from reference import tuning
from tests.test_tuning import EXAMPLES, QUICK
tuning.faster_dtype = lambda: torch.float32
tuning.train(EXAMPLES, sys.argv[1], QUICK)
"""


def test_two_processes_learn_what_one_learns(tiny, tmp_path):
    """By `accelerate launch`, on the CPU."""
    train(EXAMPLES, tmp_path / "one", QUICK)
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += [
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--num_cpu_threads_per_process=1",
        tmp_path / "two.py",
        tmp_path / "two",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert all(torch.allclose(one[name].float(), two[name].float(), rtol=0.02, atol=1e-3) for name in one)
    assert json.loads((tmp_path / "two" / "card.json").read_text())["examples"] == 12


# --- serving ----------------------------------------------------------------------------------------------------------


def test_adapters_mixed_in_one_batch_write_what_each_writes_alone(tiny, tmp_path):
    for seed in (1, 2):
        train(EXAMPLES, tmp_path / f"a{seed}", replace(QUICK, seed=seed, epochs=10, learning_rate=0.02))
    bare = LanguageModel.load()
    model = LanguageModel.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (model.load_adapter(tmp_path / f"a{seed}") for seed in (1, 2))
    assert model.load_adapter(tmp_path / "a1") == one and list(model.adapters) == [one, two]
    ask = model.chat(list(EXAMPLES[5].messages))
    names = [None, one, two, one]
    mixed = [g.tokens for g in model.generate([replace(ask, adapter=name) for name in names], 12)]
    alone = [model.generate([replace(ask, adapter=name)], 12)[0].tokens for name in names]
    assert mixed == alone and mixed[1] == mixed[3]
    assert mixed[0] == bare.generate([ask], 12)[0].tokens
    assert len({tuple(tokens) for tokens in mixed}) == 3


def test_an_adapter_that_was_not_loaded_is_refused_not_ignored(tiny_model):
    with pytest.raises(ValueError, match="no adapter 'style' is loaded"):
        tiny_model.generate([Prompt("", "hello", adapter="style")], 2)
