"""What is done to a checkout of Megatron-LM: the patches, and a trial of its unmodified script.

patch      kvshift-patch: applies the patches, checks them, takes them back
check      kvshift-check: trains with the checkout's script and compares the losses
patches/   the patches, a folder a tag
"""
