"""Where the policy's tensors come from: plain, FSDP, ZeRO-3 and PEFT models."""
