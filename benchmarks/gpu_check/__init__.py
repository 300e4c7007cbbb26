"""`python -m benchmarks.gpu_check OUT`: all that is worth knowing about a GPU, in one command of at most nine minutes.

A GPU machine is often at hand for a few minutes only. So each stage is a process of its own with a time limit of its own, its
result is written before the next one begins, the most important come first, and a stage that fails or runs out of time takes
nothing from the others. `runner` does that; `stages` lists the stages; `sizes` says how large everything is, for a GPU and
for a rehearsal on a CPU; `child` runs one stage; `page` makes a page of the results.

The budget, in seconds. The estimates are for one H200 (139 GiB, 16 cores, a local disk of 1 GB/s) and a random-weight model
of the shape of Llama-3.1-8B in bfloat16; nothing of this has been measured yet. Every stage's estimate has 8 s for the start of
Python, torch and CUDA in it; one with the 8B model 4 s for its weights, which are made on the device.

    stage       estimate  limit  what takes the time
    ceilings          12     20  copies of 1 GiB, a file of 1 GiB written and read, a matrix product
    parity            75     90  16 tiny models x 20 restores of about 0.2 s
    attention         14     20  two layers of the 8B shape, 6 settings x 3 prompts of 4 chunks
    ttft             155    185  filling 4 GiB: 15; exactness: 8; rounds of 32K, 16K, 8K, 4K tokens x 3: 60 + 27 + 18 + 15
    loading           42     55  filling 4 GiB: 15; memory: 4; 4 numbers of threads x 3 arms x 3 rounds of 2 GiB: 11
    decoding          28     40  a restore at 32K; 50 steps x 4 of 30 ms, and what cuDNN chooses for each length
    saving            35     40  3 rounds x 2 arms of 16K, 32 new tokens; 2 GiB made durable 3 times
    layerwise         26     30  8 arms x 3 rounds of 16K
    codecs             9     10  in versions that have codecs: more, from what others left
    device_codec      13     15  three Triton kernels compiled; 3 arms x 3 rounds of one chunk
    serving            9     25  in versions that serve batches: one prefix of 16K, 22 short requests
    all              418    530

What a stage leaves of its limit, the next ones may use; each still gets its own limit, as long as the budget lasts.

GPU memory: 16 GB of weights, 4 GiB of KV at 32K tokens (128 KiB per token), twice that while decoding is compared, some for
the forward. Host memory: 4 GiB for the store in memory, 2 GiB page-locked for saving. Disk: 4 GiB for the filled store of
`loading` and what follows, another 4 GiB while `ttft` runs, 2 GiB while `saving` does.
"""
