"""What becomes of a run of kvshift_megatron.pretrain when something breaks.

Exit code 0 means that the run did what it was asked for and that its newest checkpoint is there.
"Lost" counts complete steps that the same command does again after a restart.

A checkpoint is cut off, incomplete or missing
    With --load the newest whole one before it is loaded; a warning names the fault, both folders
    and the steps between them, which are lost. If none is whole the run does not start.
    Where the user named a checkpoint (--ckpt-step, --finetune, --pretrained-checkpoint) none is
    passed over, and a damaged one is refused. So is a whole one of another model, always.
The tracker file is missing or unreadable
    It is written anew, with a warning, and names the newest whole checkpoint. Lost: what was saved
    after that.
A checkpoint cannot be written (disk full, quota, permission), on any rank
    --on-save-failure stop|continue. Its folder is removed and the one before it stays the newest;
    rank 0 says which rank could not write which file, and why. Then all ranks stop (the default,
    exit code 1; saves that were under way in the background then leave halves, which are known for
    that), or all go on. Exit code 1, too, if the last save of a run has failed.
    Lost, if it ends: the steps since the newest checkpoint.
A rank hangs
    --hang-timeout-seconds N (default: half of Megatron's --distributed-timeout-minutes; 0: never).
    The run ends with exit code 1; the message names the rank, its host and process, the iteration,
    the evidence and its stack. Lost: the steps since the newest checkpoint.
A rank is killed
    torchrun ends the others on its node; those of other nodes fail in their next operation, at the
    latest at --distributed-timeout-minutes. Lost: the steps since the newest checkpoint.
A rank is killed while it saves
    The half-written folder is known for one, and the checkpoint before it is loaded. The next save
    of that iteration begins with an empty folder. Lost: the steps since the one before.
The loss or a gradient is not finite
    Megatron's checks (--no-check-for-nan-in-loss-and-grad, --rerun-mode) repeat the step. If it
    gives the same, the step before is saved, nothing is lost, and the exit code is 16; otherwise
    nothing is saved and it is 17. They leave out the first step of a process, which is checked
    here: the run ends before it saves. Lost then: the steps since the newest checkpoint.

A checkpoint is whole if its two descriptions can be read and every file has its full length. With
Megatron's --verify-integrity the files' hashes are written and compared, too.

Saves are agreed on by all ranks in Megatron's default format torch_dist, in the background only
with --async-strategy mcore --use-persistent-ckpt-worker (without the worker Megatron saves in the
foreground). Elsewhere a failed save ends the run as Megatron does, and `continue`
is refused. Logs that other parts write to a full disk are not covered.

A hang is a stretch of training or evaluation without a new forward step. Saves, loading and the
first step may take as long as they like: there it is a warning that names the rank, and Megatron's
time-out of a collective operation is what ends the run. The rank is found by its silence (stopped,
frozen, machine lost), by the operations that it has begun in each process group, or by being in
none while others are. Where no rank is behind, as with a GPU or the network, the message says so.

Parts: `fallback` (what is loaded), `saving`, `writers`, `folders` (saves), `watch`, `diagnosis`,
`progress` (hangs), `finite` (NaN), `processes` (nothing outlives a rank), `guard` (all of it around
Megatron's loop), `agreement` (of the ranks), `arguments`.
"""
