"""Every known way to get a vanilla model although KV shifting was asked for, and how it ends."""

import os
import sys
from argparse import Namespace
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, import_module

from kvshift_megatron import KVShiftConfig, assert_kv_shift, static_specs
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.attention.validation import check_args
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec, with_kv_shift
from kvshift_megatron.specs.te_free import SDPACoreAttention
from tests.specs import hybrid_specs
from tests.support import releases
from tests.support.gpt_with_mtp import gpt_with_mtp
from tests.support.single_process import gpt_model, transformer_config

KV_SHIFT = KVShiftConfig(variant="gate", seed=3)
KIND = f"KV shifting ({KV_SHIFT.describe()})"
FREE_KIND = f"KV shifting ({KVShiftConfig().describe()})"
_NO_ATTRIBUTE = ImportError if releases.failed_import_stops() else KeyError

pytestmark = pytest.mark.usefixtures("megatron_rank")


# --- a wrong module name after --spec ---


@pytest.fixture
def unimported():
    """Undo the package's import, as in a process of Megatron's, until the test ends."""

    def ours():
        return {name for name in sys.modules if name.partition(".")[0] == "kvshift_megatron"}

    before = {name: sys.modules.pop(name) for name in ours()}
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(params=["on the command line", "in parsed arguments"])
def told(request, unimported, megatron_arguments, monkeypatch):
    """Return a function that sets --spec in one of the places where Megatron finds it."""

    def tell(*spec):
        words = ["--bf16", "--spec", *spec, "--swiglu"]
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        if request.param == "in parsed arguments":
            # As from a YAML file or a checkpoint.
            monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py"])
            megatron_arguments(spec=list(spec))

    return tell


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kvshift_megatron.layer_spec", "kv_shift_layer_spec"),
        ("kvshift_megatron.static_spec", "local_layer_spec"),
        ("kvshift_megatron.specs.te_free.layer_specs", "kv_shift_layer_spec"),
        ("kvshift_megatron.layer_specs.kv_shift_layer_spec", "kv_shift_layer_spec"),
    ],
)
def test_a_misspelt_module_stops_the_run(told, module, name):
    told(module, name)
    with pytest.raises(RuntimeError, match=f"there is no {module}: .*layer_specs has"):
        import_module((module, name))


def test_a_misspelt_module_stops_a_script_that_imports_the_package_itself(unimported, monkeypatch):
    argv = ["train.py", "--spec", "kvshift_megatron.layer_spec", "kv_shift_layer_spec"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(RuntimeError, match=r"there is no kvshift_megatron\.layer_spec: "):
        import_module(("kvshift_megatron.layer_specs", "kv_shift_layer_spec"))


@pytest.mark.parametrize("spec", [ModuleSpec(SelfAttention), [], ["local"], [None, None], "local"])
def test_other_values_of_spec_are_ignored(unimported, megatron_arguments, spec):
    megatron_arguments(spec=spec)
    assert import_module(("kvshift_megatron.config", "KVShiftConfig")) is not None


def test_what_cannot_be_caught(unimported, monkeypatch):
    """Before 0.20 Megatron goes on without a spec; only `assert_kv_shift` sees it then."""

    def goes_on(*named):
        if releases.failed_import_stops():
            with pytest.raises(ImportError, match=named[0]):
                import_module(named)
        else:
            assert import_module(named) is None

    monkeypatch.setattr(sys, "argv", ["train.py"])
    # The name is neither on the command line nor in Megatron's arguments, but in a script.
    goes_on("kvshift_megatron.layer_spec", "kv_shift_layer_spec")
    # The name of another package: this one is not imported at all.
    argv = ["train.py", "--spec", "kvshift_megatronic.layer_specs", "kv_shift_layer_spec"]
    monkeypatch.setattr(sys, "argv", argv)
    goes_on("kvshift_megatronic.layer_specs", "kv_shift_layer_spec")


def test_the_package_in_place_of_its_module_stops_the_run(told):
    told("kvshift_megatron", "kv_shift_layer_spec")
    with pytest.raises(_NO_ATTRIBUTE, match="kv_shift_layer_spec"):
        import_module(("kvshift_megatron", "kv_shift_layer_spec"))


@pytest.mark.parametrize("module", ["layer_specs", "static_specs"])
def test_a_misspelt_attribute_stops_the_run(module):
    with pytest.raises(_NO_ATTRIBUTE, match="no_such_spec"):
        import_module((f"kvshift_megatron.{module}", "no_such_spec"))


def test_the_names_of_the_readme_are_found(told):
    told("kvshift_megatron.layer_specs", "kv_shift_layer_spec")
    assert import_module(("kvshift_megatron.layer_specs", "kv_shift_layer_spec")).__name__ == (
        "kv_shift_layer_spec"
    )
    told("kvshift_megatron.static_specs", "local_layer_spec")
    spec = import_module(("kvshift_megatron.static_specs", "local_layer_spec"))
    assert isinstance(spec, ModuleSpec)


# --- multi-token prediction, which Megatron builds from its own specs ---


@pytest.fixture
def megatron_arguments(monkeypatch):
    """Return a function that sets Megatron's arguments, as its training scripts do."""

    def set_arguments(**values):
        # All other flags are missing, which counts as off.
        defaults = {
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 1,
            "micro_batch_size": 1,
        }
        args = Namespace(**{**defaults, **values})
        module = sys.modules.get("megatron.training.global_vars")
        if module is None:
            module = ModuleType("megatron.training.global_vars")
            module.get_args = lambda: module._GLOBAL_ARGS
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(module, "_GLOBAL_ARGS", args, raising=False)
        return args

    return set_arguments


def mtp_config(**overrides):
    from megatron.training.models.gpt import GPTModelConfig

    return GPTModelConfig(
        transformer=transformer_config(mtp_num_layers=1),
        vocab_size=64,
        seq_length=16,
        position_embedding_type="rope",
        **overrides,
    )


def build(builder, config):
    return builder(config).build_model(
        ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
    )


def with_post_wrap_hooks(config, model):
    """Run the hooks as GPTModelBuilder.build_distributed_models does after wrapping."""
    for hook in config.post_wrap_hooks:
        (model,) = hook([model])
    return model


def test_megatrons_builder_is_stopped_with_spec_and_mtp(megatron_arguments):
    from megatron.training.models.gpt import GPTModelBuilder

    config = mtp_config(transformer_layer_spec=kv_shift_layer_spec)
    spec = ["kvshift_megatron.layer_specs", "kv_shift_layer_spec"]
    megatron_arguments(spec=spec, mtp_num_layers=1)
    with pytest.raises(ValueError, match=r"mtp_num_layers=1 with spec.*kvshift_megatron\.pretrain"):
        build(GPTModelBuilder, config)


def test_mtp_with_a_static_spec_is_refused(megatron_arguments):
    megatron_arguments(spec=["kvshift_megatron.static_specs", "local_layer_spec"])
    gpt_model(transformer_config(), static_specs.local_layer_spec)
    megatron_arguments(spec=["kvshift_megatron.static_specs", "local_layer_spec"], mtp_num_layers=1)
    with pytest.raises(ValueError, match="mtp_num_layers=1 with spec"):
        gpt_model(transformer_config(), static_specs.local_layer_spec)


def test_megatrons_builder_is_stopped_with_mtp_of_its_own_specs():
    """Without Megatron's arguments, as in a user's script, the configuration's hook sees it."""
    from megatron.training.models.gpt import GPTModelBuilder

    config = mtp_config(transformer_layer_spec=kv_shift_layer_spec)
    model = build(GPTModelBuilder, config)
    assert isinstance(model.decoder.layers[0].self_attention, KVShiftSelfAttention)
    match = r"in layers 1-2; vanilla \(SelfAttention\) in MTP layer 1.*multi-token prediction"
    with pytest.raises(ValueError, match=match):
        with_post_wrap_hooks(config, model)
    with pytest.raises(ValueError, match=match):
        assert_kv_shift(model)


def test_stock_mtp_after_shifting_layers_is_found_on_every_release():
    config = transformer_config(mtp_num_layers=1)
    layers = kv_shift_layer_spec(config, kv_shift=KV_SHIFT)
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = gpt_with_mtp(config, layers, get_gpt_mtp_block_spec(config, stock, False))
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in MTP layer 1"):
        assert_kv_shift(model)


def test_this_packages_builder_makes_mtp_that_shifts():
    from megatron.training.models import gpt

    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelBuilder, KVShiftGPTModelConfig

    before = (gpt.default_layer_spec, gpt.mtp_block_spec)
    fields = {"vocab_size": 64, "seq_length": 16, "position_embedding_type": "rope"}
    config = KVShiftGPTModelConfig(
        transformer=transformer_config(mtp_num_layers=1), kv_shift=KV_SHIFT, **fields
    )
    assert config.get_builder_cls() is KVShiftGPTModelBuilder
    model = build(KVShiftGPTModelBuilder, config)
    assert (gpt.default_layer_spec, gpt.mtp_block_spec) == before
    assert assert_kv_shift(model, KV_SHIFT) == (
        f"attention: {KIND} in layers 1-2; {KIND} in MTP layer 1; 12 taps"
    )
    with_post_wrap_hooks(config, model)

    baseline = KVShiftGPTModelConfig(transformer=transformer_config(mtp_num_layers=1), **fields)
    model = build(KVShiftGPTModelBuilder, baseline)
    kinds = {type(m) for m in model.modules() if isinstance(m, SelfAttention)}
    assert kinds == {SelfAttention}
    assert (gpt.default_layer_spec, gpt.mtp_block_spec) == before


def test_this_packages_builder_puts_megatrons_functions_back_after_a_failure():
    from megatron.training.models import gpt

    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelBuilder, KVShiftGPTModelConfig

    before = (gpt.default_layer_spec, gpt.mtp_block_spec)
    config = KVShiftGPTModelConfig(
        transformer=transformer_config(mtp_num_layers=1), vocab_size=64, kv_shift=KV_SHIFT
    )
    config.transformer.flash_decode = True
    with pytest.raises(ValueError, match="flash_decode"):
        build(KVShiftGPTModelBuilder, config)
    assert (gpt.default_layer_spec, gpt.mtp_block_spec) == before


# --- hybrid models, whose --spec Megatron ignores with inference_optimized ---


def test_hybrid_with_inference_optimized_ignores_the_spec_and_is_found():
    stack = getattr(hybrid_specs.stock, hybrid_specs.INFERENCE_STACK)
    model = torch.nn.Module()
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model.layer = build_module(
        hybrid_specs.buildable(stack.submodules.attention_layer),
        config=transformer_config(),
        layer_number=1,
        pg_collection=model.pg_collection,
    )
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in layer 1.*--spec"):
        assert_kv_shift(model)


def test_megatron_still_ignores_the_hybrid_spec_with_inference_optimized(monkeypatch):
    """The reason for the test above: when this fails, the warning in the README can go."""
    from megatron.training.argument_utils import hybrid_config_from_args

    monkeypatch.setattr(static_specs, "hybrid_stack_spec", ModuleSpec(IdentityOp), raising=False)
    names = (
        *("fp16_lm_cross_entropy", "hybrid_layer_pattern", "position_embedding_type"),
        *("rotary_percent", "rotary_base", "rotary_seq_len_interpolation_factor"),
        *("make_vocab_size_divisible_by", "padded_vocab_size", "max_position_embeddings"),
        "untie_embeddings_and_output_weights",
    )
    given = dict.fromkeys(names, 1)
    args = Namespace(**given, spec=("kvshift_megatron.static_specs", "hybrid_stack_spec"))
    config = transformer_config()
    taken = hybrid_config_from_args(args, config).hybrid_stack_spec
    assert taken is static_specs.hybrid_stack_spec
    config.transformer_impl = "inference_optimized"
    assert hybrid_config_from_args(args, config).hybrid_stack_spec is None


# --- the schedule plan, which does not pass the documents' bounds to layers ---


@pytest.mark.parametrize("packing", ["sft", "dataloader_inter_document_masking"])
def test_the_schedule_plan_is_refused_with_packed_documents(megatron_arguments, packing):
    overlap = {"overlap_moe_expert_parallel_comm": True}
    args = megatron_arguments(**overlap, **{packing: True})
    match = "overlap_moe_expert_parallel_comm with packed documents.*drop --overlap"
    with pytest.raises(ValueError, match=match):
        check_args(args)
    # The layers refuse it too, whichever script builds the model.
    with pytest.raises(ValueError, match=match):
        gpt_model(transformer_config(), static_specs.local_layer_spec)
    check_args(megatron_arguments(**overlap))
    check_args(megatron_arguments(**{packing: True}))


# --- a shared spec that other code changes ---


def local_attention_config(spec):
    from megatron.training.models.gpt import GPTModelConfig

    config = GPTModelConfig(
        transformer=transformer_config(attention_backend=AttnBackend.local),
        transformer_layer_spec=spec,
        vocab_size=64,
        seq_length=16,
        position_embedding_type="rope",
    )
    return config


@contextmanager
def unset_backend():
    """Keep Megatron's attention backend, which it stores in the environment, to one test."""
    with mock.patch.dict(os.environ):
        for name in ("FLASH", "FUSED", "UNFUSED"):
            os.environ.pop(f"NVTE_{name}_ATTN", None)
        yield


def core_attentions(model):
    return [type(layer.self_attention.core_attention) for layer in model.decoder.layers]


@pytest.fixture
def static_spec(monkeypatch):
    """Return the module global; changes to it are undone."""
    spec = static_specs.local_layer_spec
    parts = spec.submodules.self_attention.submodules
    monkeypatch.setattr(parts, "core_attention", parts.core_attention)
    return spec


def test_megatrons_builder_swaps_core_attention_and_a_static_spec_still_shifts(static_spec):
    from megatron.training.models.gpt import GPTModelBuilder

    config = local_attention_config(static_spec)
    with unset_backend():
        first, second = build(GPTModelBuilder, config), build(GPTModelBuilder, config)
    for model in (first, second):
        assert assert_kv_shift(model) == f"attention: {FREE_KIND} in layers 1-2; 16 taps"
        assert core_attentions(model) == [DotProductAttention] * 2
    # A model that is built directly from the changed spec shifts too.
    assert_kv_shift(gpt_model(transformer_config(), static_specs.local_layer_spec))


def test_megatrons_builder_swaps_core_attention_in_its_own_copy_of_a_callables_spec():
    from megatron.training.models.gpt import GPTModelBuilder

    def taps(model):
        return {n: p for n, p in model.named_parameters() if ".alpha_" in n or ".beta_" in n}

    config = local_attention_config(kv_shift_layer_spec)
    with unset_backend():
        first, second = build(GPTModelBuilder, config), build(GPTModelBuilder, config)
    for model in (first, second):
        assert assert_kv_shift(model) == f"attention: {FREE_KIND} in layers 1-2; 16 taps"
    assert core_attentions(first) == core_attentions(second)
    plain = gpt_model(transformer_config(), kv_shift_layer_spec(transformer_config()))
    assert core_attentions(plain) == [SDPACoreAttention] * 2
    expected = taps(plain)
    assert all(torch.equal(tap, expected[name]) for name, tap in taps(second).items())


@pytest.mark.parametrize("change", ["module", "core_attention", "params", "layer"])
def test_changing_a_stock_spec_after_its_conversion_changes_nothing(change):
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    converted = with_kv_shift(stock, KV_SHIFT)
    before = repr(converted)
    attention = stock.submodules.self_attention
    if change == "module":
        attention.module = IdentityOp
    elif change == "core_attention":
        attention.submodules.core_attention = IdentityOp
    elif change == "params":
        attention.params.clear()
    else:
        stock.submodules.self_attention = ModuleSpec(SelfAttention)
    assert repr(converted) == before
    model = gpt_model(transformer_config(), converted)
    assert assert_kv_shift(model, KV_SHIFT) == f"attention: {KIND} in layers 1-2; 8 taps"


def test_two_conversions_of_one_spec_are_independent():
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    gate, free = with_kv_shift(stock, KV_SHIFT), with_kv_shift(stock)
    gate.submodules.self_attention.module = SelfAttention
    gate.submodules.self_attention.params.clear()
    assert_kv_shift(gpt_model(transformer_config(), free), KVShiftConfig())
    vanilla = vanilla_layer_spec(transformer_config())
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in layers 1-2"):
        assert_kv_shift(gpt_model(transformer_config(), vanilla))
