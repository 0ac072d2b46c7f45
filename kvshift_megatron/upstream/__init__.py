"""Everything that this package replaces in Megatron and torch at run time, in tables.

`substitutions` is the engine; `on_import` is the same for modules that are not imported yet. The
public functions of a table return its rows and do nothing else; they take the replacements that
need objects of their subject. Nothing here imports another part of the package.

    cpu_table           the CPU device layer (`cpu`); waits for Megatron's imports
    faults_table        failed saves, lost ranks, NaN (`training.faults`); for good
    metrics_table       the log and TensorBoard (`training.metrics`); for the length of a run
    builder_table       Megatron's GPT builder (`training.gpt_builder`); while a model is built
    planning_table      counted steps and dry runs (`planning`)
    dataset_helpers     compiled helpers of a wheel; for good

What is no row, and why:

- Classes that derive from Megatron's and override a method: nothing is replaced.
- Settings that Megatron reads: its arguments, `is_distributed` of a provider of datasets, and a
  configuration's `post_wrap_hooks` and `finalize_model_grads_func`.
- `_normalize_expert_param_name` in `bridge`: an attribute of an object that the overriding method
  around it has just made, and that keeps it for good. There is nothing to restore.
- `add_many` of the TensorBoard writer (`training.metrics.recorders`): torch's class has no such
  method, so none is replaced.
- "meta" among the devices of torch's fake process group (`planning.meta_device`): an entry of a
  list, which grows; no attribute changes.
- Fields of layer specs (`specs.rewrite`): those of a copy.
"""
