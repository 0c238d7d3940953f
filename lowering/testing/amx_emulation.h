// What lowering/templates/amx_tiles.jinja writes in assembly, in plain C++, for CPUs without AMX:
// compile with -DFP4_EMULATE_AMX -include this file. It aborts where the hardware would trap.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

constexpr int ROWS_OF_A_TILE = 16;

struct EmulatedTiles {
    bool configured = false;
    alignas(64) uint8_t tile[8][ROWS_OF_A_TILE][64];
};

inline thread_local EmulatedTiles emulated_tiles;

template <typename T, int TILE>
T (&emulated_tile())[ROWS_OF_A_TILE][64 / sizeof(T)] {
    static_assert(0 <= TILE && TILE < 8);
    if (!emulated_tiles.configured) std::abort();
    return reinterpret_cast<T(&)[ROWS_OF_A_TILE][64 / sizeof(T)]>(emulated_tiles.tile[TILE]);
}

inline bool tiles_granted() { return true; }

template <typename Configuration>
void tile_configure(const Configuration* configuration) {
    static_assert(sizeof(Configuration) == 64);
    if (configuration->palette != 1 || configuration->start_row != 0) std::abort();
    for (int i = 0; i < 8; i++) {
        const bool whole = configuration->row_bytes[i] == 64 && configuration->rows[i] == 16;
        if (!whole) std::abort();
    }
    emulated_tiles.configured = true;
}

inline void tile_release() { emulated_tiles.configured = false; }

template <int TILE>
void tile_zero() {
    std::memset(emulated_tile<uint8_t, TILE>(), 0, 1024);
}

template <int TILE>
void tile_load(const void* first_row, int64_t stride) {
    auto& tile = emulated_tile<uint8_t, TILE>();
    for (int row = 0; row < ROWS_OF_A_TILE; row++)
        std::memcpy(tile[row], static_cast<const char*>(first_row) + row * stride, 64);
}

template <int TILE>
void tile_store(void* first_row, int64_t stride) {
    const auto& tile = emulated_tile<uint8_t, TILE>();
    for (int row = 0; row < ROWS_OF_A_TILE; row++)
        std::memcpy(static_cast<char*>(first_row) + row * stride, tile[row], 64);
}

template <int SUM, int A, int B>
void tile_product_int8() {
    auto& sum = emulated_tile<uint32_t, SUM>();  // wraps around as the hardware does
    const auto& a = emulated_tile<int8_t, A>();
    const auto& b = emulated_tile<uint8_t, B>();
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 4; i++)
                    sum[m][n] += static_cast<uint32_t>(a[m][k * 4 + i] * b[k][n * 4 + i]);
}

inline float emulated_bf16(uint16_t bits) {
    const uint32_t upper = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &upper, 4);
    return value;
}

// Even and odd k are summed apart, then together.
template <int SUM, int A, int B>
void tile_product_bf16() {
    auto& sum = emulated_tile<float, SUM>();
    const auto& a = emulated_tile<uint16_t, A>();
    const auto& b = emulated_tile<uint16_t, B>();
    for (int m = 0; m < 16; m++) {
        float part[2][16] = {};
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 2; i++)
                for (int n = 0; n < 16; n++)
                    part[i][n] += emulated_bf16(a[m][k * 2 + i]) * emulated_bf16(b[k][n * 2 + i]);
        for (int n = 0; n < 16; n++) sum[m][n] += part[0][n] + part[1][n];
    }
}
