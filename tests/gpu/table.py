"""All checks, the most telling first: a run that is cut off has then told the most. Imports no torch."""

from tests.gpu.runner import Check

CHECKS = (
    Check("packages", 20, "tests.gpu.place:packages", "Python has what the harness imports"),
    Check("machine", 30, "tests.gpu.place:machine", "torch can use every GPU that nvidia-smi lists"),
    Check("placement", 60, "tests.gpu.place:placement", "everything of each built-in config is on the device"),
    Check("one_rank", 45, "tests.gpu.compare:one_rank", "an update on one rank is that of plain PyTorch"),
    Check("two_ranks_ddp", 60, "tests.gpu.compare:two_ranks_ddp", "so is one of two ranks, on one GPU over gloo"),
    Check("throughput", 75, "tests.gpu.measure:throughput", "a GPT of 350M reaches 40 % of the peak in bf16", True),
    Check("resume", 75, "tests.gpu.place:resume", "a resumed run comes back to the same bits"),
    Check("workers", 45, "tests.gpu.place:workers", "rows that workers read ahead are on the device, to the bit"),
    Check("host_reads", 45, "tests.gpu.measure:host_reads", "an update does not wait for the device", True),
    Check("save", 60, "tests.gpu.measure:save", "a save holds training up for one copy to pinned memory"),
    Check("bf16", 40, "tests.gpu.compare:bf16", "bf16 is torch's autocast"),
    Check("fp16", 40, "tests.gpu.compare:fp16", "fp16 skips and scales as torch's GradScaler"),
    Check("zero1", 75, "tests.gpu.compare:zero1", "ZeRO-1 on two ranks is plain PyTorch"),
    Check("zero2", 75, "tests.gpu.compare:zero2", "ZeRO-2 on two ranks is plain PyTorch"),
    Check("zero3", 75, "tests.gpu.compare:zero3", "ZeRO-3 on two ranks is plain PyTorch"),
    Check("kernel_gaps", 75, "tests.gpu.measure:kernel_gaps", "the GPU is idle in at most 10 % of the time", True),
    Check("peak_memory", 45, "tests.gpu.measure:peak_memory", "memory is 16 bytes a weight and activations", True),
    Check(
        "activation_checkpointing",
        45,
        "tests.gpu.compare:activation_checkpointing",
        "computing activations again changes no number, and takes less memory",
    ),
    Check("ema", 40, "tests.gpu.compare:ema", "the average of the weights is its formula"),
    Check("random_state", 20, "tests.gpu.place:random_state", "random states, CUDA's too, are restored"),
    Check("copies_ahead", 30, "tests.gpu.measure:copies_ahead", "copies to the device wait for nothing", True),
    Check("offload", 90, "tests.gpu.compare:offload", "ZeRO with its state on the host is plain PyTorch", True),
)
