"""Everything that this package replaces in Megatron and torch at run time, in tables.

`substitutions` is the engine; `on_import` extends it to modules that are not imported yet. The
public functions of a table only return its rows; they take replacements that need objects of the
table's subject as arguments. Nothing here imports another part of the package.

    cpu_table           the CPU device layer (`cpu`); waits for Megatron's imports
    faults_table        failed saves, lost ranks, NaN (`training.faults`); never undone
    loading_table       checks of what is loaded (`checks`, `stored`); never undone
    metrics_table       the log and TensorBoard (`training.metrics`); for the length of a run
    builder_table       Megatron's GPT builder (`training.gpt_builder`); while a model is built
    planning_table      counted steps and dry runs (`planning`)
    dataset_helpers     compiled helpers of a wheel; never undone

What is not a row, and why:

- Classes that derive from Megatron's and override a method: nothing is replaced.
- Settings that Megatron reads: its arguments, a dataset provider's `is_distributed`, and a
  configuration's `post_wrap_hooks` and `finalize_model_grads_func`.
- `_normalize_expert_param_name` in `bridge`: set on an object that the overriding method around it
  has just made, and kept as long as the object lives. There is nothing to restore.
- `add_many` of the TensorBoard writer (`training.metrics.recorders`): torch's class has no such
  method, so none is replaced.
- "meta" among the devices of torch's fake process group (`planning.meta_device`): a list gets one
  more entry; no attribute changes.
- Fields of layer specs (`specs.rewrite`): only copies are changed.
"""
