// The rate of vpdpbusd with nothing but registers: the roof of an int8 GEMM on AVX512-VNNI.
#include <cstdint>

#define STEP(sum) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #sum "\n\t"
#define CHAINS 12  // independent, to hide the latency of each

// The operations done by `steps` steps on every thread; a multiplication and an addition are two.
extern "C" int64_t run(int64_t steps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t left = steps;
        __asm__ volatile(
            "vpxord %%zmm30, %%zmm30, %%zmm30\n\t"
            "vpxord %%zmm31, %%zmm31, %%zmm31\n\t"
            "1:\n\t"
            STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
            STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
            "dec %0\n\t"
            "jnz 1b\n\t"
            : "+r"(left)
            :
            : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",
              "zmm10", "zmm11", "zmm30", "zmm31");
    }
    return steps * CHAINS * 64 * 2 * threads;
}
