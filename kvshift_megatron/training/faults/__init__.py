"""What happens to a run of kvshift_megatron.pretrain when something breaks.

Exit code 0 means that the run did what it was asked to do and that its latest checkpoint was saved.
"Lost" steps are complete steps that the same command repeats after a restart.

The latest checkpoint is truncated, incomplete or missing
    With --load, the run loads the last complete one and logs a warning that names the fault, both
    folders and the number of steps between them, which are lost. If no checkpoint is complete, the
    run does not start. If the user names a checkpoint (--ckpt-step, --finetune,
    --pretrained-checkpoint), no other is loaded and a damaged one is refused. A complete checkpoint
    of another model is always refused.
The tracker file is missing or unreadable
    It is rewritten, with a warning, and names the last complete checkpoint. Lost: the steps after
    that checkpoint.
A rank cannot write its part of a checkpoint (disk full, quota, permission)
    --on-save-failure stop|continue. The folder is removed and the previous checkpoint stays the
    latest; rank 0 logs which rank could not write which file, and why. Then all ranks stop (the
    default, exit code 1; other saves in the background are left incomplete and recognised as such),
    or all continue. The exit code is also 1 if the last save of a run fails.
    Lost, if the run ends: the steps since the latest checkpoint.
A rank hangs
    --hang-timeout-seconds N (default: half of Megatron's --distributed-timeout-minutes; 0: never).
    The run ends with exit code 1; the message names the rank, its host and process, the iteration,
    the evidence and its stack. Lost: the steps since the latest checkpoint.
A rank is killed
    torchrun ends the other ranks on its node; those on other nodes fail in their next operation, at
    the latest after --distributed-timeout-minutes. Lost: the steps since the latest checkpoint.
A rank is killed while it saves
    The incomplete folder is recognised, and the checkpoint before it is loaded. The next save of
    that iteration starts with an empty folder. Lost: the steps since the checkpoint before.
The loss or a gradient is not finite
    Megatron's checks (--no-check-for-nan-in-loss-and-grad, --rerun-mode) repeat the step. If the
    result is the same, the state before the step is saved, nothing is lost and the exit code is 16;
    otherwise nothing is saved and it is 17. They skip the first step of a process, which is checked
    here: the run ends before it saves, and the steps since the latest checkpoint are lost.

A checkpoint is complete if its two descriptions can be read, every file has its full length and,
unless --no-verify-integrity is given, the hashes are those that were written when it was saved. A
checkpoint without hashes passes with a warning.

All ranks agree whether a save has failed in Megatron's default format torch_dist; in the background
only with --async-strategy mcore --use-persistent-ckpt-worker (without the worker Megatron saves in
the foreground). Otherwise a failed save ends the run as in Megatron, and `continue` is refused.
Logs that other parts write to a full disk are not covered.

A hang is a period of training or evaluation without a new forward step. Saving, loading and the
first step have no limit of their own: they cause only a warning that names the rank, and Megatron's
time-out of a collective operation ends the run. The rank is identified because it no longer reports
(stopped, frozen, machine lost), because it has started fewer operations of a process group than
others, or because it is not communicating while others are. If no rank stands out, as when a GPU or
the network fails, the message says so.

Modules: `settle`, `fallback`, `hashes` (what is loaded), `places` (what is written to), `saving`,
`checkpoint_writes`, `checkpoint_folder` (saves), `watch`, `diagnosis`, `progress` (hangs), `finite`
(NaN), `processes` (nothing outlives a rank), `guard` (all of it around Megatron's loop),
`agreement` (among the ranks), `fault_flags`.
"""
