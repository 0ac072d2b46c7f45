"""The compared models, and the layouts of each."""

import json
from dataclasses import dataclass, field, replace

from kvshift_megatron import KVShiftConfig


@dataclass(frozen=True)
class Model:
    """A tiny GPT; `transformer` overrides TransformerConfig fields.

    With `hybrid`, a hybrid model with these layer patterns as pipeline segments, of which every
    stage gets the same number. `like` names the model whose single process it must repeat, if that
    is another one.
    """

    name: str
    num_query_groups: int = 4
    kv_shift: KVShiftConfig | None = KVShiftConfig()
    seq_length: int = 16
    transformer: dict = field(default_factory=dict)
    bf16: bool = False
    # The last step's loss depends on two updates with Adam's moments.
    steps: int = 3
    hybrid: tuple[str, ...] = ()
    like: str | None = None


@dataclass(frozen=True)
class Case:
    """One model at one layout. Ranks that the other axes do not use are data-parallel."""

    model: Model
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int | None = None
    sp: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    transformer: dict = field(default_factory=dict)
    planted_error: str | None = None
    # bf16 only, (parts of a product, micro-batch size): a single process sums in another order.
    reordering: tuple[int, int] | None = None

    @property
    def layout(self) -> tuple[int, int, int, int | None]:
        """What a launch's process groups depend on: (tp, pp, cp, vpp). `ep` adds its own groups."""
        return self.tp, self.pp, self.cp, self.vpp

    @property
    def name(self) -> str:
        parts = [self.model.name, f"tp{self.tp}"]
        parts += ["sp"] if self.sp else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        parts += [f"cp{self.cp}"] if self.cp > 1 else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"vpp{self.vpp}"] if self.vpp else []
        parts += ["distopt"] if self.distributed_optimizer else []
        parts += ["overlap"] if self.overlap else []
        parts += [f"{key}={value}" for key, value in self.transformer.items()]
        parts += [f"planted:{self.planted_error}"] if self.planted_error else []
        parts += [f"reordered:{self.reordering[0]}-{self.reordering[1]}"] if self.reordering else []
        return "-".join(parts)


GQA = Model("gqa4")
GQA2 = Model("gqa2", num_query_groups=2)
MQA = Model("mqa", num_query_groups=1)
MHA = Model("mha", num_query_groups=8)
QK_NORM = Model("qk-layernorm", num_query_groups=2, transformer={"qk_layernorm": True})
GATED = Model("output-gate", num_query_groups=2, transformer={"attention_output_gate": True})
# Under CP 2 and 4 these have chunks of one or two tokens.
SHORT_4 = Model("gqa2-4-tokens", num_query_groups=2, seq_length=4)
SHORT_8 = Model("gqa2-8-tokens", num_query_groups=2, seq_length=8)
WINDOW_3 = Model("window3", num_query_groups=2, kv_shift=KVShiftConfig(window=3))
GATE = Model("gate-variant", num_query_groups=2, kv_shift=KVShiftConfig(variant="gate"))
KEYS_ONLY = Model(
    "clamp-keys-only",
    num_query_groups=2,
    kv_shift=KVShiftConfig(variant="clamp", window=4, shift_values=False, init="identity"),
)
VANILLA = Model("vanilla", kv_shift=None)
# bf16 runs that differ only in rounding need more steps to diverge.
BF16 = Model("bf16-gqa2", num_query_groups=2, bf16=True, steps=5)

# Layers 1 and 3 have the window, or no rotary embedding; 2 and 4 are ordinary. With 16 tokens the
# gradients of the alphas of layer 1 cancel so far that some CPUs' rounding exceeds the tolerance.
SLIDING = Model(
    "sliding-window",
    num_query_groups=2,
    seq_length=32,
    transformer={"window_size": (4, 0), "window_attn_skip_freq": 2},
)
SCALED = Model("softmax-scale", num_query_groups=2, transformer={"softmax_scale": 0.3})
NO_ROPE = Model("no-rope", num_query_groups=2, transformer={"no_rope_freq": [1, 0, 1, 0]})
MOE = Model(
    "moe",
    num_query_groups=2,
    transformer={
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1, 0, 1],
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 32,
        # A balancing loss depends on the micro-batches, which differ between layouts.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    },
)
MTP = Model("mtp", num_query_groups=2, transformer={"mtp_num_layers": 1})


def _block(groups: int | None = None, ffn: int | None = 96, linear: bool = False) -> dict:
    """Describe a layer of a heterogeneous model; without groups, no attention or one matrix."""
    return {
        "attention": {
            "num_query_groups": groups,
            "no_op": groups is None and not linear,
            "replace_with_linear": linear,
        },
        "mlp": {"ffn_hidden_size": ffn, "no_op": ffn is None, "replace_with_linear": False},
    }


HETEROGENEOUS = Model(
    "heterogeneous",
    transformer={
        "num_layers": 5,
        "heterogeneous_layers_config_encoded_json": json.dumps(
            {
                "block_configs": [
                    _block(4), _block(2, ffn=64), _block(linear=True), _block(), _block(8, ffn=None)
                ]
            }
        ),
    },
)  # fmt: skip
# Hybrid models, and the GPT models of the same layers.
FIVE_STEPS = Model("gqa2-5-steps", num_query_groups=2, steps=5)
HYBRID = replace(
    FIVE_STEPS,
    name="hybrid",
    hybrid=("*-*-", "*-*-"),
    transformer={"num_layers": 8},
    like=FIVE_STEPS.name,
)
HYBRID_MOE = replace(
    MOE,
    name="hybrid-moe",
    hybrid=("*-*E", "*-*E"),
    transformer={**MOE.transformer, "num_layers": 8, "moe_layer_freq": 1},
    like=MOE.name,
)
HYBRID_BF16 = replace(HYBRID, name="hybrid-bf16", bf16=True, like=BF16.name)

# Models that are not a stack of equal, ordinary GPT layers.
KINDS = (SLIDING, SCALED, NO_ROPE, MOE, MTP, HETEROGENEOUS, HYBRID, HYBRID_MOE)
# MOE itself has the all-to-all dispatcher. With tensor-parallel experts it gathers unequal numbers
# of tokens, which gloo refuses.
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
UNEVEN = {"pipeline_model_parallel_layout": "Et|tt|t|L"}
UNEVEN_MTP = {"pipeline_model_parallel_layout": "Ett|t|t|mL"}
UNEVEN_HETEROGENEOUS = {
    "num_layers_in_first_pipeline_stage": 2,
    "num_layers_in_last_pipeline_stage": 3,
}

FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}

REFERENCES = {
    model.name: Case(model)
    for model in (
        GQA, GQA2, MQA, MHA, QK_NORM, GATED, WINDOW_3, GATE, KEYS_ONLY, VANILLA, BF16,
        SHORT_4, SHORT_8, FIVE_STEPS, *KINDS,
    )
}  # fmt: skip

_TWO = [
    *(Case(model, tp=2) for model in (GQA, GQA2, MQA, MHA, GATED, GATE, KEYS_ONLY, VANILLA)),
    *(Case(model, tp=2, sp=True) for model in (GQA, MQA, QK_NORM, GATED, WINDOW_3)),
    Case(GQA, pp=2),
    Case(GQA, pp=2, vpp=2),
    Case(GQA, pp=2, vpp=2, overlap=True, distributed_optimizer=True),
    Case(GQA),
    Case(GQA, distributed_optimizer=True),
    Case(GQA, distributed_optimizer=True, overlap=True),
    Case(MQA, overlap=True),
    Case(GQA2, tp=2, sp=True, transformer=FULL_RECOMPUTE),
    Case(MQA, tp=2, sp=True, transformer=FULL_RECOMPUTE),
    Case(GQA2, tp=2, transformer=SELECTIVE_RECOMPUTE),
    *(Case(model, cp=2) for model in (GQA, MQA, WINDOW_3, KEYS_ONLY, VANILLA, SHORT_4, SHORT_8)),
    Case(WINDOW_3, cp=2, transformer=FULL_RECOMPUTE),
    Case(GQA2, cp=2, transformer=SELECTIVE_RECOMPUTE),
    Case(GQA2, cp=2, distributed_optimizer=True, overlap=True),
    *(Case(model, tp=2, sp=True) for model in KINDS if model != HETEROGENEOUS),
    # Without sequence parallelism, with which Megatron's linear replacement has a wrong shape.
    Case(HETEROGENEOUS, tp=2),
    *(Case(model, pp=2) for model in (SLIDING, NO_ROPE, MOE, MTP, HYBRID)),
    Case(HETEROGENEOUS, pp=2, transformer=UNEVEN_HETEROGENEOUS),
    *(Case(model, cp=2) for model in (SLIDING, SCALED, NO_ROPE, MOE, MTP, HYBRID)),
    Case(HYBRID, distributed_optimizer=True),
    Case(HYBRID_MOE, pp=2),
    Case(HYBRID_MOE, ep=2),
    Case(GQA2, pp=2, vpp=2, transformer=UNEVEN),
    Case(MTP, pp=2, vpp=2, transformer=UNEVEN_MTP),
    Case(MOE, ep=2),
    Case(MOE, ep=2, transformer=ALLGATHER),
]
_FOUR = [
    *(Case(model, tp=4) for model in (GQA, GQA2, MQA, MHA, GATED, WINDOW_3, GATE, KEYS_ONLY)),
    *(Case(model, tp=4, sp=True) for model in (GQA, GQA2, MQA, QK_NORM)),
    Case(GQA, tp=2, pp=2),
    Case(MQA, tp=2, pp=2, vpp=2, sp=True),
    Case(GQA, tp=2, distributed_optimizer=True),
    Case(MQA, tp=2, sp=True, distributed_optimizer=True, overlap=True),
    Case(GQA, pp=2, distributed_optimizer=True),
    Case(GQA2, tp=4, sp=True, transformer=FULL_RECOMPUTE),
    *(Case(model, cp=4) for model in (GQA, WINDOW_3, SHORT_8, VANILLA)),
    Case(GQA, tp=2, cp=2),
    *(Case(model, tp=2, cp=2, sp=True) for model in (GQA, MQA, WINDOW_3)),
    Case(MQA, tp=2, cp=2, sp=True, transformer=FULL_RECOMPUTE),
    Case(GQA, pp=2, cp=2),
    Case(WINDOW_3, pp=2, cp=2, transformer=FULL_RECOMPUTE),
    Case(MOE, tp=2, ep=2, sp=True, transformer=ALLGATHER),
    Case(MTP, tp=2, pp=2, vpp=2, sp=True, transformer=UNEVEN_MTP),
    Case(SLIDING, tp=2, cp=2, sp=True),
    Case(HYBRID, tp=2, pp=2, sp=True),
    Case(HYBRID, pp=2, cp=2),
    Case(HYBRID, tp=2, sp=True, distributed_optimizer=True),
]
_PLANTED = {
    2: [
        Case(GQA, tp=2, planted_error="taps_swapped"),
        Case(GQA, tp=2, planted_error="shift_by_two"),
        Case(GQA, tp=2, planted_error="rope_before_shift"),
        Case(GQA, tp=2, planted_error="shard_permuted"),
        Case(MQA, tp=2, planted_error="shared_groups_not_summed"),
        Case(BF16, tp=2, planted_error="taps_swapped"),
        Case(MTP, tp=2, planted_error="mtp_spec_not_converted"),
        Case(GQA, cp=2, planted_error="second_chunk_from_wrong_rank"),
        Case(GQA, cp=2, planted_error="no_own_tokens_on_the_last_rank"),
        Case(GQA, cp=2, planted_error="no_backward_exchange"),
        Case(HYBRID, tp=2, planted_error="taps_swapped"),
    ],
    4: [
        Case(GQA2, tp=4, planted_error="shard_permuted"),
        Case(GQA2, tp=4, sp=True, planted_error="shared_groups_not_summed"),
        Case(GQA, cp=4, planted_error="second_chunk_from_wrong_rank"),
        Case(GQA, cp=4, planted_error="no_own_tokens_on_the_last_rank"),
        Case(GQA, cp=4, planted_error="no_backward_exchange"),
    ],
}
_REORDERINGS = [(parts, micro_batch) for parts in (1, 2, 4, 8) for micro_batch in (1, 2, 4)]
_BF16 = {
    1: [Case(BF16, reordering=reordering) for reordering in _REORDERINGS],
    2: [
        Case(BF16, tp=2),
        Case(BF16, tp=2, sp=True),
        Case(BF16, pp=2),
        Case(BF16, distributed_optimizer=True),
        Case(HYBRID_BF16, distributed_optimizer=True),
        Case(HYBRID_BF16, tp=2, sp=True),
    ],
    4: [
        Case(BF16, tp=4),
        Case(BF16, tp=4, sp=True),
        Case(BF16, tp=2, pp=2, sp=True),
        Case(HYBRID_BF16, tp=2, pp=2, sp=True),
    ],
}

# World size -> the cases that one launch runs, in order.
LAYOUTS = {1: list(REFERENCES.values()), 2: _TWO, 4: _FOUR}
LAYOUTS[1] += [
    replace(REFERENCES["gqa2"], transformer=FULL_RECOMPUTE),
    replace(REFERENCES["gqa2"], transformer=SELECTIVE_RECOMPUTE),
]
PLANTED = _PLANTED
BF16_LAYOUTS = _BF16


def cases(world_size: int) -> list[Case]:
    """Return everything that the launch of this world size runs."""
    return [
        *LAYOUTS[world_size],
        *PLANTED.get(world_size, []),
        *BF16_LAYOUTS[world_size],
    ]
