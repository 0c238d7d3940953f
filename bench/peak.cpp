// The rate of int8 products with nothing but registers: the roof of an int8 GEMM. vpdpbusd multiplies and
// adds in one instruction; without AVX512-VNNI vpmaddubsw multiplies and adds pairs in 16 bits, and vpaddw
// adds those up, which is what small integers allow and larger ones do not reach.
#include <cstdint>

#if VNNI
#define LANES 64
#define ZERO "vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31\n\t"
#define STEP(sum) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #sum "\n\t"
#define OPERANDS "zmm30", "zmm31"
#else
#define LANES 32
#define ZERO "vpxor %%ymm14, %%ymm14, %%ymm14\n\tvpxor %%ymm15, %%ymm15, %%ymm15\n\t"
#define STEP(sum) \
    "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n\tvpaddw %%ymm13, %%ymm" #sum ", %%ymm" #sum "\n\t"
#define OPERANDS "xmm13", "xmm14", "xmm15"
#endif
#define CHAINS 12  // independent, to hide the latency of each

// The operations done by `steps` steps on every thread; a multiplication and an addition are two.
extern "C" int64_t run(int64_t steps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t left = steps;
        __asm__ volatile(
            ZERO
            "1:\n\t"
            STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
            STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
            "dec %0\n\t"
            "jnz 1b\n\t"
            : "+r"(left)
            :
            : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", OPERANDS);
    }
    return steps * CHAINS * LANES * 2 * threads;
}
