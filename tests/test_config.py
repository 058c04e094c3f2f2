"""Settings: what is read, what is filled in, and what is refused in words that help."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from picotron_mini.config import (
    ConfigError,
    DataConfig,
    MeshShape,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from picotron_mini.legality import context_problems, layout_problems, resolve
from picotron_mini.model.legality import model_problems

MODEL = ModelConfig(vocab_size=100, hidden_size=48, intermediate_size=96, num_layers=3, num_heads=6, num_kv_heads=2)


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pp", "dp", "tp"),
    [
        ("dp=2,tp=2,pp=2", 2, 2, 2),
        ("pp=3", 3, 1, 1),
        (" tp = 4 , dp=1 ", 1, 1, 4),
        ("1", 1, 1, 1),
        ("", 1, 1, 1),
    ],
)
def test_parse(text: str, pp: int, dp: int, tp: int) -> None:
    shape = MeshShape.parse(text)
    assert shape == MeshShape(pp=pp, dp=dp, tp=tp)
    assert shape.world_size == pp * dp * tp
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("dp", ["'dp'", "dp=2,tp=2"]),
        ("dp=two", ["'dp=two'", "AXIS=SIZE"]),
        ("dp=-1", ["'dp=-1'", "AXIS=SIZE"]),
        ("dp=2;tp=2", ["'dp=2;tp=2'", "AXIS=SIZE"]),
        ("qp=2", ["'qp'", "pp, dp, cp, tp, ep"]),
        ("dp=2,dp=2", ["'dp'", "twice"]),
        ("tp=0", ["tp=0", "at least 1"]),
    ],
)
def test_parse_says_what_it_could_not_read(text: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        MeshShape.parse(text)
    for name in [repr(text), *names]:
        assert name in str(error.value)


# --- the legality of a layout -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"hidden_size": -8}, "hidden_size=-8 must be at least 1"),
        (
            {"num_heads": 6, "num_kv_heads": 4},
            "num_heads=6 is not a multiple of num_kv_heads=4; num_kv_heads could be 2 or 3",
        ),
        (
            {"hidden_size": 50},
            "hidden_size=50 is not a multiple of num_heads=6; num_heads could be 2 or 5, or set head_dim",
        ),
        ({"head_dim": 7}, "head_dim=7 must be even: rotary embedding turns pairs of channels; use head_dim=6 or 8"),
        ({"head_dim": 1}, "use head_dim=2"),
        ({"hidden_size": 42}, "head_dim=7 (hidden_size=42 / num_heads=6) must be even"),
        ({"head_dim": -2}, "head_dim=-2 must be at least 1, or 0 for hidden_size // num_heads"),
        ({"vocab_size": -5}, "vocab_size=-5 must be at least 1, or 0 for the tokenizer's entries"),
        ({"max_position": -1}, "max_position=-1 must be at least 1"),
        ({"rope_scaling": RopeScaling(factor=0.0)}, "rope_scaling: factor=0.0 must be a number above 0"),
        ({"rope_scaling": RopeScaling(factor=float("inf"))}, "rope_scaling: factor=inf must be a number above 0"),
        ({"rope_scaling": RopeScaling(original_max_position=0)}, "rope_scaling: original_max_position=0 must be"),
        ({"rope_scaling": RopeScaling(low_freq_factor=4.0)}, "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
    ],
)
def test_model_problems(change: dict[str, Any], message: str) -> None:
    (problem,) = model_problems(replace(MODEL, **change))
    assert message in problem
    assert layout_problems(replace(MODEL, **change), MeshShape(tp=5)) == [
        problem
    ]  # not drowned by what follows from it


def test_a_model_can_choose_its_head_dim() -> None:
    assert model_problems(replace(MODEL, hidden_size=50, head_dim=8)) == []


@pytest.mark.parametrize(
    ("change", "mesh", "messages"),
    [
        ({}, MeshShape(tp=2), []),
        ({}, MeshShape(pp=3, dp=5, tp=2), []),
        ({}, MeshShape(pp=4), ["pp=4 is more than num_layers=3; use pp<=3"]),
        ({}, MeshShape(tp=3), ["tp=3 does not divide num_kv_heads=2; tp could be 1 or 2"]),
        (
            {},
            MeshShape(tp=4),
            [
                "tp=4 does not divide num_heads=6; tp could be 1 or 2",
                "tp=4 does not divide num_kv_heads=2; tp could be 1 or 2",
            ],
        ),
        ({"intermediate_size": 97}, MeshShape(tp=2), ["tp=2 does not divide intermediate_size=97; tp could be 1"]),
        # 5 by 4 is 2, 2, 1, 0: the convention of layout.py leaves the last rank without a row
        (
            {"num_heads": 4, "num_kv_heads": 4, "vocab_size": 5},
            MeshShape(tp=4),
            ["tp=4 leaves a rank without any of vocab_size=5; tp could be 1 or 2, or vocab_size=7"],
        ),
        ({"num_heads": 4, "num_kv_heads": 4, "vocab_size": 7}, MeshShape(tp=4), []),
        # a larger vocabulary alone would not help
        (
            {"num_heads": 4, "vocab_size": 5},
            MeshShape(tp=4),
            [
                "tp=4 does not divide num_kv_heads=2; tp could be 1 or 2",
                "tp=4 leaves a rank without any of vocab_size=5; tp could be 1 or 2",
            ],
        ),
        ({"vocab_size": 0}, MeshShape(tp=2), []),  # not known yet: the tokenizer will say
    ],
)
def test_layout_problems_name_the_value_and_what_works(
    change: dict[str, int], mesh: MeshShape, messages: list[str]
) -> None:
    problems = layout_problems(replace(MODEL, **change), mesh)
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 12, "num_kv_heads": 12, "vocab_size": 0},
        {"num_heads": 12, "num_kv_heads": 4},
        {"num_heads": 15, "num_kv_heads": 5, "intermediate_size": 90},
        {"num_heads": 12, "num_kv_heads": 12, "vocab_size": 9},
        {"num_heads": 8, "num_kv_heads": 4, "moe": MoEConfig(num_experts=4, top_k=2, expert_size=12, shared_size=6)},
        {"num_heads": 8, "num_kv_heads": 8, "moe": MoEConfig(4, 2, expert_size=24, dense_layers=1)},
    ],
)
def test_what_is_said_about_tp_agrees_and_works(change: dict[str, Any]) -> None:
    """Each size by itself would allow another tp; what is advised must do for all of them."""
    model = replace(MODEL, head_dim=8, **change)
    legal = [tp for tp in range(1, 60) if not layout_problems(model, MeshShape(tp=tp))]
    for tp in range(1, 14):
        said = [problem.partition("tp could be ")[2] for problem in layout_problems(model, MeshShape(tp=tp))]
        assert bool(said) == (tp not in legal)
        for text in said:
            advised, _, vocab = text.partition(", or vocab_size=")
            numbers = [int(each) for each in advised.split(" or ")]
            far = sorted(abs(other - tp) for other in legal if other <= 4 * tp)
            assert set(numbers) <= set(legal) and sorted(abs(each - tp) for each in numbers) == far[:2]
            if vocab:
                assert not layout_problems(replace(model, vocab_size=int(vocab)), MeshShape(tp=tp))
        assert len({text.partition(",")[0] for text in said}) <= 1


def test_a_length_is_not_judged_by_a_tp_that_the_model_refuses() -> None:
    """It was told to be 15 or 18, and tp to be 1 or 2: whoever did both was refused again."""
    train = TrainConfig(seq_len=16, sequence_parallel=True)
    with pytest.raises(ConfigError) as error:
        resolve(RunConfig(layout="tp=3", model=MODEL, train=train))
    assert str(error.value) == "tp=3 does not divide num_kv_heads=2; tp could be 1 or 2"
    resolve(RunConfig(layout="tp=2", model=MODEL, train=train))


@pytest.mark.parametrize(
    ("layout", "train", "problem"),
    [
        ("cp=2", {"seq_len": 12}, None),
        ("cp=3", {"seq_len": 12}, None),
        (
            "cp=4",
            {"seq_len": 12},
            "2*cp=8 does not divide seq_len=12, and context=ring cuts equal parts; use seq_len=8",
        ),
        (
            "cp=8",
            {"seq_len": 12},
            "2*cp=16 does not divide seq_len=12, and context=ring cuts equal parts; use seq_len=16",
        ),
        ("dp=3", {"seq_len": 13, "context": "ulysses"}, None),  # no cp, nothing to cut
        ("cp=2", {"seq_len": 14, "context": "ulysses"}, None),
        (
            "cp=2",
            {"seq_len": 13, "context": "ulysses"},
            "cp=2 does not divide seq_len=13, and context=ulysses cuts equal",
        ),
        ("cp=3", {"seq_len": 12, "context": "ulysses"}, "cp*tp=3 does not divide num_kv_heads=2, and context=ulysses"),
        ("cp=3,tp=2", {"seq_len": 12, "sequence_parallel": True}, None),
        (
            "cp=3,tp=2",
            {"seq_len": 21, "context": "ulysses", "sequence_parallel": True},
            "sequence_parallel: cp*tp=6 does not divide seq_len=21; seq_len could be 18 or 24",
        ),
        (
            "cp=2,tp=2",
            {"seq_len": 12, "context": "ulysses"},
            "cp*tp=4 does not divide num_heads=6 and num_kv_heads=2, and context=ulysses gives each rank whole heads; "
            "cp could be 1, or use context=ring",
        ),
        (  # the length, which would have to change for another cp, is not judged by this one
            "cp=3",
            {"seq_len": 14, "context": "ulysses"},
            "cp*tp=3 does not divide num_kv_heads=2, and context=ulysses gives each rank whole heads; cp could be 1 or "
            "2",
        ),
    ],
)
def test_sequences_and_heads_that_cp_can_share(layout: str, train: dict[str, Any], problem: str | None) -> None:
    run = RunConfig(layout=layout, model=MODEL, train=TrainConfig(**train))
    if problem is None:
        assert resolve(run).mesh == MeshShape.parse(layout)
        return
    with pytest.raises(ConfigError) as error:
        resolve(run)
    assert problem in str(error.value)


def test_lengths_for_ulysses_and_sequence_parallel_agree() -> None:
    train = TrainConfig(context="ulysses", sequence_parallel=True, seq_len=20)
    model = replace(MODEL, num_heads=12, num_kv_heads=12)
    with pytest.raises(ConfigError) as error:
        resolve(RunConfig(layout="cp=3,tp=2", model=model, train=train))
    said = str(error.value).splitlines()
    assert [line.rsplit(" ", 3)[1:] for line in said] == [["seq_len=18", "or", "24"], ["18", "or", "24"]]
    for fits in (12, 18, 24):
        assert resolve(RunConfig(layout="cp=3,tp=2", model=model, train=replace(train, seq_len=fits)))


def test_lengths_for_the_ring_and_sequence_parallel_agree() -> None:
    train = TrainConfig(sequence_parallel=True, seq_len=125)
    with pytest.raises(ConfigError) as error:
        resolve(RunConfig(layout="cp=2,tp=2", model=MODEL, train=train))
    assert str(error.value).count("124 or 128") == 2
    for fits in (124, 128):
        assert resolve(RunConfig(layout="cp=2,tp=2", model=MODEL, train=replace(train, seq_len=fits)))


@pytest.mark.parametrize(
    ("model", "train", "words"),
    [
        ({}, {"recompute": "layer"}, "recompute='layer' is not one of none, selective, full"),
        ({}, {"schedule": "gpipe"}, "schedule='gpipe' is not one of 1f1b, afab, interleaved, zb-h1, zb-v"),
        ({"moe": MoEConfig(balance="luck")}, {}, "balance='luck' is not one of aux, bias, none"),  # type: ignore[arg-type]
    ],
)
def test_a_value_that_a_setting_does_not_have(model: dict[str, Any], train: dict[str, Any], words: str) -> None:
    """From the command line and from files it cannot come."""
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"):
        resolve(RunConfig(layout="dp=2", model=replace(MODEL, **model), train=replace(TrainConfig(), **train)))


def test_settings_of_a_class_of_ones_own() -> None:
    class Mine(TrainConfig):
        """With more to say."""

    run = RunConfig(layout="dp=2", model=MODEL, train=Mine())
    assert resolve(run).train.schedule == "1f1b"
    with pytest.raises(ConfigError, match="recompute='layer' is not one of"):
        resolve(replace(run, train=Mine(recompute="layer")))  # type: ignore[arg-type]


def test_micro_batches_for_interleaved_are_advised_in_groups_of_pp() -> None:
    train = TrainConfig(schedule="interleaved", batch_size=8, micro_batches=3)
    with pytest.raises(ConfigError, match="micro_batches=3 does not divide the 8 sequences of a rank; try 4 or 8$"):
        resolve(RunConfig(layout="pp=4", model=replace(MODEL, num_layers=8), train=train))


def test_the_lengths_and_cp_that_are_suggested_do_work() -> None:
    model = replace(MODEL, num_heads=12, num_kv_heads=12)
    for context, cp, seq_len, tp in itertools.product(("ring", "ulysses"), range(2, 9), range(2, 40), (1, 2)):
        train = TrainConfig(context=context, seq_len=seq_len)
        for problem in context_problems(model, MeshShape(cp=cp, tp=tp), train):
            if "use seq_len=" in problem:
                for fits in problem.split("use seq_len=")[1].split(" or "):
                    other = context_problems(model, MeshShape(cp=cp, tp=tp), replace(train, seq_len=int(fits)))
                    assert other == [], problem
            else:
                for fits in problem.split("cp could be ")[1].split(",")[0].split(" or "):
                    assert context_problems(model, MeshShape(cp=int(fits), tp=tp), train) == [], problem
                if "use context=ring" in problem:
                    assert context_problems(model, MeshShape(cp=cp, tp=tp), replace(train, context="ring")) == []


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size", "number", "expected"),
    [
        (0, 0, 0, (2, 1, 1)),
        (0, 3, 0, (6, 3, 1)),
        (0, 0, 4, (8, 1, 4)),
        (0, 3, 4, (24, 3, 4)),
        (24, 0, 0, (24, 12, 1)),
        (24, 3, 0, (24, 3, 4)),
        (24, 0, 4, (24, 3, 4)),
        (24, 3, 4, (24, 3, 4)),
    ],
)
def test_batch_sizes_are_filled_in(batch: int, size: int, number: int, expected: tuple[int, int, int]) -> None:
    train = TrainConfig(batch_size=batch, micro_batch_size=size, micro_batches=number)
    out = resolve(RunConfig(layout="dp=2", model=MODEL, train=train)).train
    assert (out.batch_size, out.micro_batch_size, out.micro_batches) == expected
    assert resolve(RunConfig(layout="dp=2", model=MODEL, train=out)).train == out  # once is enough


@pytest.mark.parametrize(
    ("batch", "size", "number", "message"),
    [
        (25, 0, 0, "batch_size=25 does not split over dp=2; try 24"),
        (1, 0, 0, "batch_size=1 does not split over dp=2; try 2"),
        (24, 5, 0, "micro_batch_size=5 does not divide the 12 sequences of a rank; try 4 or 6"),
        (24, 0, 8, "micro_batches=8 does not divide the 12 sequences of a rank; try 4 or 6"),
        (24, 3, 3, "dp=2 * micro_batch_size=3 * micro_batches=3 = 18, not batch_size=24"),
        (-2, 0, 0, "batch_size=-2"),
    ],
)
def test_batch_sizes_that_do_not_fit(batch: int, size: int, number: int, message: str) -> None:
    train = TrainConfig(batch_size=batch, micro_batch_size=size, micro_batches=number)
    with pytest.raises(ConfigError) as error:
        resolve(RunConfig(layout="dp=2", model=MODEL, train=train))
    assert message in str(error.value)


# --- the whole run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("train", "steps", 0),
        ("train", "seq_len", 1),
        ("train", "eval_batches", 0),
        ("train", "warmup_steps", -1),
        ("train", "lr", 0.0),
        ("train", "lr", float("nan")),
        ("train", "bucket_mb", -1.0),
        ("data", "val_fraction", 0.0),
        ("data", "val_fraction", 1.0),
        ("data", "val_seed", -1),
        ("data", "val_seed", 2**63),
    ],
)
def test_settings_out_of_range(group: str, name: str, value: float) -> None:
    run = RunConfig(model=MODEL)
    run = replace(run, **{group: replace(getattr(run, group), **{name: value})})
    with pytest.raises(ConfigError, match=f"{name}={value} must"):
        resolve(run)


def test_every_problem_is_told_at_once() -> None:
    run = RunConfig(layout="pp=9", model=MODEL, train=TrainConfig(steps=0, lr=-1.0))
    with pytest.raises(ConfigError) as error:
        resolve(run)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == ["pp=9", "steps=0", "lr=-1.0"]


def test_more_ranks_than_gpus() -> None:
    run = RunConfig(layout="dp=4", model=MODEL)
    with pytest.raises(ConfigError, match=r"layout dp=4 needs 4 GPUs and there are 2; use fewer ranks or device=cpu"):
        resolve(run, gpus=2)
    assert resolve(run, gpus=4).mesh.world_size == 4
    assert resolve(replace(run, train=TrainConfig(device="cpu")), gpus=2).train.device == "cpu"


def test_no_gpu_at_all() -> None:
    with pytest.raises(ConfigError, match="device=cuda, and torch sees no GPU; use device=cpu"):
        resolve(RunConfig(layout="dp=1", model=MODEL, train=TrainConfig(device="cuda")))


@pytest.mark.parametrize(
    ("gpus", "device", "layout"), [(0, "cpu", "dp=2,tp=2"), (1, "cuda", "dp=1"), (4, "cuda", "dp=4")]
)
def test_layout_and_device_are_chosen(gpus: int, device: str, layout: str) -> None:
    run = resolve(RunConfig(model=MODEL), gpus=gpus)
    assert (run.train.device, run.layout) == (device, layout)


def test_resolve_fills_what_was_open() -> None:
    run = resolve(RunConfig(layout="tp=2, dp=1", model=MODEL))
    assert run.layout == "tp=2"
    assert run.model.head_dim == 8


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (("layers.1",), ["layers.1.mlp.up.weight"]),
        (("layers.1.",), ["layers.1.mlp.up.weight"]),
        (("layers",), ["layers.1.mlp.up.weight", "layers.10.mlp.up.weight"]),
        (("layers.1.mlp.up.weight",), ["layers.1.mlp.up.weight"]),
        (("norm", "embed"), ["norm.weight", "embed.weight"]),
        (("emb", ""), []),
    ],
)
def test_freezing_goes_by_whole_parts_of_a_name(freeze: tuple[str, ...], frozen: list[str]) -> None:
    names = ["embed.weight", "layers.1.mlp.up.weight", "layers.10.mlp.up.weight", "norm.weight"]
    train = TrainConfig(freeze=freeze)
    assert [name for name in names if train.freezes(name)] == [name for name in names if name in frozen]


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        (("embed", "layers", "norm"), "freeze=embed layers norm freezes every parameter and leaves nothing to train"),
        (("embedding",), "freeze='embedding' begins no parameter's name (whole parts, up to a dot); they are embed."),
        (("layers.3",), "freeze='layers.3' begins no parameter's name (whole parts, up to a dot); they are layers.0."),
        (("",), "freeze='' begins no parameter's name"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(freeze: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve(RunConfig(layout="dp=1", model=MODEL, train=TrainConfig(freeze=freeze)))
    untied = replace(MODEL, tie_embeddings=False)
    assert resolve(RunConfig(layout="dp=1", model=untied, train=TrainConfig(freeze=("embed", "layers", "norm"))))


# --- plain data -------------------------------------------------------------------------------------------


def test_dict_round_trip_through_json() -> None:
    run = RunConfig(
        layout="dp=2",
        model=replace(MODEL, rope_scaling=RopeScaling(factor=4.0)),
        data=DataConfig(text=("a.txt", "b.txt")),
        train=TrainConfig(freeze=("embed", "layers.0")),
    )
    back = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert back == run
    assert isinstance(back.model.rope_scaling, RopeScaling)
    assert back.train.freeze == ("embed", "layers.0")
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(RunConfig())))) == RunConfig()


def test_a_whole_number_may_stand_for_a_real_one() -> None:
    lr = from_dict(TrainConfig, {"lr": 1}).lr
    assert lr == 1.0
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown setting 'trian'; the top level has data, layout, model, name, out, train"),
        ({"train": {"stesp": 3}}, "unknown setting 'train.stesp'; train has"),
        ({1: 2}, "unknown setting '1'"),
        ({"train": {"steps": "3"}}, "train.steps='3' must be of type int"),
        ({"train": {"steps": True}}, "train.steps=True must be of type int"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5 must be of type int"),
        ({"train": {"steps": [3]}}, "train.steps=[3] must be of type int"),
        ({"train": {"lr": "fast"}}, "train.lr='fast' must be of type float"),
        ({"train": {"compile": 1}}, "train.compile=1 must be of type bool"),
        ({"train": {"dtype": "float8"}}, "train.dtype='float8' is not one of float64, float32, bfloat16"),
        ({"train": {"dtype": ["float32"]}}, "train.dtype=['float32'] is not one of"),
        ({"train": 3}, "train=3 must be a group of settings"),
        ({"train": None}, "train=None must be a group of settings"),
        ({"model": {"rope_scaling": 8.0}}, "model.rope_scaling=8.0 must be a group of settings"),
        ({"model": {"rope_scaling": {"factr": 8.0}}}, "unknown setting 'model.rope_scaling.factr'"),
        ({"data": {"text": "book.txt"}}, "data.text='book.txt' must be a list of str"),
        ({"data": {"text": [1]}}, "data.text=[1] must be a list of str"),
        ([1, 2], "settings are names with values"),
    ],
)
def test_data_that_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(RunConfig, values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be 0"),
        ({"lr": float("inf")}, "lr=inf must be a number above 0"),
        ({"beta2": 1.5}, "beta2=1.5 must lie between 0 and 1"),
        ({"beta1": 1.0}, "beta1=1.0 must lie between 0 and 1, below 1"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be 0"),
        ({"seed": -1}, "seed=-1 must be 0 or above"),
    ],
)
def test_numbers_that_would_turn_training_upside_down_are_refused(setting: dict[str, float], said: str) -> None:
    run = RunConfig(layout="dp=1", train=TrainConfig(batch_size=2, **setting))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        resolve(run)


def test_sequence_parallel_needs_equal_parts_of_the_sequence() -> None:
    train = TrainConfig(seq_len=9, sequence_parallel=True)
    assert resolve(
        RunConfig(
            layout="tp=3", model=ModelConfig(intermediate_size=96, num_heads=6, num_kv_heads=3, head_dim=8), train=train
        )
    )
    with pytest.raises(
        ConfigError, match="sequence_parallel: tp=2 does not divide seq_len=9; seq_len could be 8 or 10"
    ):
        resolve(RunConfig(layout="tp=2", train=train))
