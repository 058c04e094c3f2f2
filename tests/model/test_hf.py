"""Our model against `transformers`' own, both ways, in float64; and what a folder must hold to be read."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from picotron_mini.config import ConfigError, ModelConfig, RopeScaling, UserError
from picotron_mini.model.gpt import GPT, init_weights
from picotron_mini.model.hf import hf_name, load_hf, save_hf
from picotron_mini.model.hf_config import config_from_hf, config_to_hf

SMALL = ModelConfig(vocab_size=29, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=4, head_dim=6)


def random_config(seed: int) -> ModelConfig:
    """Small and odd: GQA, tied or not, Qwen3's norm or not, Llama 3's rotary scaling or not."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    qk_norm = bool(seed & 1)
    # transformers' Llama wants a width that the heads divide; its Qwen3 does not
    width = rng.randrange(11, 60) if qk_norm else heads * rng.randrange(3, 12)
    return ModelConfig(
        vocab_size=rng.randrange(7, 90),
        hidden_size=width,
        intermediate_size=rng.randrange(5, 70),
        num_layers=rng.choice([1, 2, 3]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * rng.randrange(1, 9),
        rope_theta=rng.choice([100.0, 10_000.0, 500_000.0]),
        # original lengths at which some of these few frequencies fall into each of the three bands
        rope_scaling=RopeScaling(rng.uniform(2, 9), 1.0, rng.uniform(2, 5), rng.choice([8, 64])) if seed & 2 else None,
        norm_eps=rng.choice([1e-5, 1e-6]),
        tie_embeddings=bool(seed & 4),
        qk_norm=qk_norm,
        max_position=rng.choice([128, 4096]),
    )


def perturbed(model: nn.Module) -> None:
    """Weights that make every part matter: norms are not ones, and outputs are not nearly uniform."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) * 0.2 + (weight.ndim == 1))


def compare(ours: GPT, theirs: Any, config: ModelConfig) -> None:
    tokens = torch.randint(config.vocab_size, (2, 33))
    got = ours.logits(ours(tokens))
    want = theirs(tokens).logits
    assert want.dtype == torch.float64
    assert (got - want).abs().max() / want.abs().max() < 1e-9
    mix = torch.randn_like(want)  # a gradient that reaches every logit
    (got * mix).sum().backward()
    (want * mix).sum().backward()
    grads = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert set(grads) == {hf_name(name) for name, _ in ours.named_parameters()}
    for name, weight in ours.named_parameters():
        a, b = weight.grad, grads[hf_name(name)]
        assert a is not None and b.abs().max() > 0, name
        assert (a - b).abs().max() / b.abs().max() < 1e-9, name


@pytest.mark.parametrize("seed", range(16))
def test_transformers_computes_what_we_saved(widened: Any, tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    ours = GPT(config).double()
    perturbed(ours)
    save_hf(ours, config, tmp_path / "model", max_shard_bytes=random.Random(seed).choice([1, 2000, 2**30]))
    theirs, info = widened.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    compare(ours, theirs, config)


@pytest.mark.parametrize("seed", range(16, 32))
def test_we_compute_what_transformers_saved(widened: Any, tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    kind = ("Qwen3" if config.qk_norm else "Llama") + "{}"
    hf_config = getattr(widened, kind.format("Config"))(**config_to_hf(config))
    theirs = getattr(widened, kind.format("ForCausalLM"))(hf_config).double()
    perturbed(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size=random.Random(seed).choice([1000, 20_000, "1GB"]))
    read, state = load_hf(tmp_path)
    assert read == config
    ours = GPT(read).double()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["head.weight"] if config.tie_embeddings else [])
    compare(ours, theirs, config)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        for config in (SMALL, replace(SMALL, tie_embeddings=False, rope_scaling=RopeScaling(), qk_norm=True)):
            model = GPT(config).to(dtype)
            init_weights(model, 0)
            folder = tmp_path / f"{number}{config.qk_norm}"
            save_hf(model, config, folder)
            read, state = load_hf(folder)
            assert read == config
            assert list(state) == [name for name, _ in model.named_parameters()]
            for name, weight in model.named_parameters():
                assert state[name].dtype == dtype and torch.equal(state[name], weight), name


def test_shards_hold_at_most_their_share_and_the_index_is_complete(tmp_path: Path) -> None:
    model = GPT(SMALL)
    save_hf(model, SMALL, tmp_path / "a", max_shard_bytes=6000)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= 6000
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    _, state = load_hf(tmp_path / "a")
    assert all(torch.equal(state[name], weight) for name, weight in model.named_parameters())


def test_views_of_one_buffer_and_whole_state_dicts_are_saved(tmp_path: Path) -> None:
    model = GPT(SMALL)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    pieces = flat.split([p.numel() for p in model.parameters()])
    views = {name: v.view_as(p) for v, (name, p) in zip(pieces, model.named_parameters(), strict=True)}
    save_hf(views, SMALL, tmp_path / "views")
    save_hf(model.state_dict(), SMALL, tmp_path / "state")  # names the tied head a second time
    for folder in ("views", "state"):
        _, state = load_hf(tmp_path / folder)
        assert all(torch.equal(state[name], view) for name, view in views.items())


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(SMALL)
    (tmp_path / "empty").mkdir()
    save_hf(model, SMALL, tmp_path / "empty")
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    with pytest.raises(UserError, match="is not empty"):
        save_hf(GPT(SMALL), SMALL, tmp_path / "empty")
    assert {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("picotron_mini.model.hf.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_hf(model, SMALL, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_hf(model, SMALL, tmp_path / "file" / "model")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_hf(GPT(SMALL), SMALL, tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), "layers.1.mlp.up.weight is missing"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(20)}), "up_proj.bias is not a tensor"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}),
            "layers.2.mlp.up_proj.weight is not",
        ),
        (lambda t: t.update({UP: torch.ones(21, 24)}), r"up.weight has shape \[21, 24\], not \[20, 24\]"),
        (lambda t: t.update({UP: torch.ones(20, 24, dtype=torch.int8)}), "up.weight has dtype torch.int8"),
        (lambda t: t.update({UP: torch.ones(20, 24).to(torch.float8_e4m3fn)}), "dtype torch.float8_e4m3fn"),
        (lambda t: t.update({"lm_head.weight": torch.ones(29, 24)}), "head.weight differs from embed.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_weights(saved, change)
    with pytest.raises(ConfigError, match=message):
        load_hf(saved)


def test_harmless_extras_are_read(saved: Path) -> None:
    _, before = load_hf(saved)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # equal to what it is tied to
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_weights(saved, add)
    _, after = load_hf(saved)
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_many_misfits_are_summed_up(saved: Path) -> None:
    edit_weights(saved, lambda t: [t.pop(name) for name in list(t)[:14]])
    with pytest.raises(ConfigError, match="and 4 more"):
        load_hf(saved)


def test_damaged_or_foreign_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*config.json"):
        load_hf(tmp_path / "nowhere")
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        load_hf(saved)
    weights.rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors is read, not pickles"):
        load_hf(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        load_hf(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, not a JSON object"):
        load_hf(saved)


def test_a_wrong_index_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_hf(GPT(SMALL), SMALL, folder, max_shard_bytes=6000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(change: dict[str, object] | None) -> None:
        index.write_text(json.dumps({"weight_map": None if change is None else good["weight_map"] | change}))

    for outside in ("../secret.safetensors", "/etc/passwd", 3):
        with_map({UP: outside})
        with pytest.raises(UserError, match="which is not a file name"):
            load_hf(folder)
    other = next(file for file in good["weight_map"].values() if file != good["weight_map"][UP])
    with_map({UP: other})
    with pytest.raises(UserError, match="disagree about model.layers.1.mlp.up_proj.weight"):
        load_hf(folder)
    with_map(None)
    with pytest.raises(UserError, match="has no weight_map"):
        load_hf(folder)
    with_map({})
    (folder / other).unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_hf(folder)


def test_saving_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    state = dict(GPT(SMALL).named_parameters())
    with pytest.raises(ConfigError, match="the weights to save .*\nlayers.1.mlp.up.weight is missing"):
        save_hf({n: w for n, w in state.items() if n != "layers.1.mlp.up.weight"}, SMALL, tmp_path / "a")
    with pytest.raises(ConfigError, match="head.weight is missing"):
        save_hf(GPT(SMALL), replace(SMALL, tie_embeddings=False), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", range(8))
def test_configurations_survive_both_spellings(seed: int) -> None:
    config = random_config(seed)
    old = config_to_hf(config)
    assert config_from_hf(json.loads(json.dumps(old))) == config
    rope = {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": old["rope_theta"]}
    new = {k: v for k, v in old.items() if not k.startswith("rope")} | {"rope_parameters": rope}
    assert config_from_hf(new) == config
    assert config_from_hf(new | {"rope_theta": 7.0}) == config  # as in transformers, the rotary settings win


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    for hf in (
        transformers.LlamaConfig(**sizes),
        transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    ):
        sparse = sizes | {k: getattr(hf, k) for k in ("model_type", "num_key_value_heads", "head_dim")}
        sparse |= {"tie_word_embeddings": True} if hf.tie_word_embeddings else {}
        assert config_from_hf(sparse) == config_from_hf(hf.to_dict())
    assert config_from_hf(sizes | {"model_type": "llama"}).head_dim == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64, "architectures": None}, "window=64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor=None"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "'full_attention' in the rotary settings"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_theta": "big"}, "rope_theta='big' must be a number"),
        ({"vocab_size": None}, "vocab_size=None must be an integer"),
        ({"hidden_size": 24.0}, "hidden_size=24.0 must be an integer"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"num_attention_heads": 0}, "num_heads=0"),
        ({"model_type": "qwen3", "architectures": None, "head_dim": None}, "head_dim=None must be an integer"),
    ],
)
def test_what_this_model_cannot_compute_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_to_hf(SMALL) | change)


def test_a_window_that_is_switched_off_is_no_window() -> None:
    config = replace(SMALL, qk_norm=True)
    off = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    assert config_from_hf(config_to_hf(config) | off | {"layer_types": ["full_attention"] * 2}) == config
