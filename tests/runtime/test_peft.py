"""Adapters of PEFT on sketched layers: plain LoRA works, what needs a dense weight is refused."""

import pickle

import pytest
import torch

from spallm_convert import OptionError, SketchedLinear, load_sketched

peft = pytest.importorskip("peft")

TOKENS = torch.arange(2, 40).reshape(2, 19)
TARGETS = ["q_proj", "up_proj"]
ADVICE = "but SketchedLinear has an index map and tables: use plain LoRA, train the tables instead"
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT has warnings of its own


@pytest.fixture
def base(sketched_llama):
    return load_sketched(sketched_llama, dtype=torch.float32)


def lora(**options):
    return peft.LoraConfig(**{"target_modules": TARGETS, "r": 4} | options)


def trained(base, **options):
    """Give a model LoRA and train it for some steps."""
    model = peft.get_peft_model(base, lora(**options))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) < 20_000
    optimizer = torch.optim.AdamW(trainable, lr=3e-2)
    losses = []
    for _ in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_lora_trains_saves_and_loads(sketched_llama, base, tmp_path):
    model = trained(base)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        load_sketched(sketched_llama, dtype=torch.float32), tmp_path
    )
    assert torch.equal(logits(again.eval()), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_the_values_are_those_of_lora_on_the_dense_model(sketched_llama, base, tmp_path):
    model = trained(base)
    model.save_pretrained(tmp_path)
    dense = load_sketched(sketched_llama, dtype=torch.float32).dequantize()
    dense = peft.PeftModel.from_pretrained(dense, tmp_path).eval()
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-5)
    merged = dense.merge_and_unload()
    assert not any(isinstance(module, SketchedLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_anything_is_merged(base, merge):
    """Even if layers that are not sketched come first."""
    model = trained(base, target_modules=[*TARGETS, "embed_tokens"])
    before = logits(model)
    with pytest.raises(OptionError, match=f"merging needs a dense weight, {ADVICE}"):
        getattr(model, merge)()
    assert torch.equal(logits(model), before)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(OptionError, match="merging needs a dense weight"):
        layer.merge()


def test_unloading_gives_the_base(sketched_llama, base):
    model = trained(base)
    unloaded = model.unload()
    assert type(unloaded.model.layers[0].mlp.up_proj) is SketchedLinear
    assert torch.equal(logits(unloaded), logits(load_sketched(sketched_llama, dtype=torch.float32)))


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_adapters_are_combined_without_weights(base, kind):
    model = trained(base)
    model.add_adapter("other", lora())
    options = {"density": 0.5} if kind == "ties" else {}
    names = ["default", "other"]
    model.add_weighted_adapter(names, [1.0, 1.0], "both", combination_type=kind, **options)
    expected = logits(model)
    model.set_adapter("both")
    if kind == "cat":  # the other adapter adds zero
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("initial", ["gaussian", False, "eva"])
def test_initial_values_that_do_not_depend_on_the_weight(base, initial):
    model = peft.get_peft_model(base, lora(init_lora_weights=initial))
    model(TOKENS, labels=TOKENS).loss.backward()


WEIGHTS_NEEDED = {
    "dora": {"use_dora": True},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    **{
        name: {"init_lora_weights": name}
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "orthogonal")
    },
    "parameters": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
}


@pytest.mark.parametrize("name", WEIGHTS_NEEDED)
def test_kinds_of_lora_that_need_the_weight_are_refused(base, name):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(OptionError, match=f"PEFT: .* needs a dense weight, {ADVICE}"):
        peft.get_peft_model(base, lora(**WEIGHTS_NEEDED[name]))
    after = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["AdaLora", "BOFT", "IA3", "LoHa", "LoKr", "OFT", "Vera"])
def test_other_methods_are_refused(base, name):
    options = {"feedforward_modules": ["up_proj"]} if name == "IA3" else {}
    options |= {"total_step": 10} if name == "AdaLora" else {}
    config = getattr(peft, f"{name}Config")(target_modules=TARGETS, **options)
    with pytest.raises(OptionError, match=f"the method {name.upper()} needs a dense weight"):
        peft.get_peft_model(base, config)


def test_methods_that_leave_sketched_layers_alone_work(base):
    model = peft.get_peft_model(base, peft.LNTuningConfig(target_modules=["norm"]))
    model(TOKENS, labels=TOKENS).loss.backward()


def test_any_method_works_on_a_dense_model(base):
    model = peft.get_peft_model(base.dequantize(), lora(use_dora=True, init_lora_weights="pissa"))
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_adapters_through_transformers(sketched_llama, base, tmp_path):
    base.add_adapter(lora(init_lora_weights="gaussian"))
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "SketchedLoraLinear"
    base.save_pretrained(tmp_path)
    again = load_sketched(sketched_llama, dtype=torch.float32)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(base.eval()))
