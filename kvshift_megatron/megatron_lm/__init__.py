"""Commands for a checkout of Megatron-LM: its patches, and a trial of its unmodified script.

patch      kvshift-patch: applies, checks or reverts the patches
check      kvshift-check: trains with the checkout's script and compares the losses
patches/   the patches, one folder per tag
"""
