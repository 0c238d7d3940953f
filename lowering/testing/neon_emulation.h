// The intrinsics of NEON that lowering/templates/neon.jinja uses, in plain C++, for CPUs that are not ARM:
// compile with -include and this file. Semantics: Arm's "Neon Intrinsics Reference" (IHI 0073).
#pragma once
#include <cstdint>
#include <cstring>

#define FP4_NEON_TYPE(name, element, bytes) \
    typedef element name __attribute__((vector_size(bytes), may_alias))
FP4_NEON_TYPE(int8x8_t, int8_t, 8);
FP4_NEON_TYPE(uint8x8_t, uint8_t, 8);
FP4_NEON_TYPE(int8x16_t, int8_t, 16);
FP4_NEON_TYPE(uint8x16_t, uint8_t, 16);
FP4_NEON_TYPE(int16x8_t, int16_t, 16);
FP4_NEON_TYPE(int32x4_t, int32_t, 16);
FP4_NEON_TYPE(float32x4_t, float, 16);

struct int8x16x2_t { int8x16_t val[2]; };
struct int8x16x4_t { int8x16_t val[4]; };
struct int8x8x4_t { int8x8_t val[4]; };
struct uint8x8x3_t { uint8x8_t val[3]; };

template <typename Vector, typename Element>
inline Vector neon_load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

// Every ``count``-th element, from each of the first ``count`` on.
template <typename Vectors, int COUNT, typename Element>
inline Vectors neon_load_interleaved(const Element* from) {
    Vectors vectors;
    constexpr int LANES = sizeof(vectors.val[0]) / sizeof(Element);
    for (int i = 0; i < LANES * COUNT; i++) vectors.val[i % COUNT][i / COUNT] = from[i];
    return vectors;
}

inline int8x16_t vld1q_s8(const int8_t* from) { return neon_load<int8x16_t>(from); }
inline uint8x16_t vld1q_u8(const uint8_t* from) { return neon_load<uint8x16_t>(from); }
inline int8x16x4_t vld1q_s8_x4(const int8_t* from) { return neon_load<int8x16x4_t>(from); }
inline int8x16x2_t vld2q_s8(const int8_t* from) { return neon_load_interleaved<int8x16x2_t, 2>(from); }
inline uint8x8x3_t vld3_u8(const uint8_t* from) { return neon_load_interleaved<uint8x8x3_t, 3>(from); }
inline int8x8x4_t vld4_s8(const int8_t* from) { return neon_load_interleaved<int8x8x4_t, 4>(from); }
inline void vst1q_s8(int8_t* to, int8x16_t vector) { std::memcpy(to, &vector, 16); }
inline void vst1q_s32(int32_t* to, int32x4_t vector) { std::memcpy(to, &vector, 16); }
inline void vst1q_f32(float* to, float32x4_t vector) { std::memcpy(to, &vector, 16); }

inline uint8x16_t vdupq_n_u8(uint8_t value) { return uint8x16_t{} + value; }
inline int32x4_t vdupq_n_s32(int32_t value) { return int32x4_t{} + value; }
inline int8x16_t vreinterpretq_s8_u8(uint8x16_t vector) { return (int8x16_t)vector; }
inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) { return a & b; }
inline uint8x8_t vorr_u8(uint8x8_t a, uint8x8_t b) { return a | b; }
inline int8x16_t veorq_s8(int8x16_t a, int8x16_t b) { return a ^ b; }
inline int8x16_t vsubq_s8(int8x16_t a, int8x16_t b) { return a - b; }
inline int8x16_t vshrq_n_s8(int8x16_t vector, int count) { return vector >> count; }
inline uint8x16_t vshrq_n_u8(uint8x16_t vector, int count) { return vector >> count; }
inline uint8x8_t vshr_n_u8(uint8x8_t vector, int count) { return vector >> count; }
inline uint8x8_t vshl_n_u8(uint8x8_t vector, int count) { return vector << count; }
inline int8x8_t vget_low_s8(int8x16_t vector) { return neon_load<int8x8_t>(reinterpret_cast<int8_t*>(&vector)); }
inline int8x8_t vget_high_s8(int8x16_t vector) {
    return neon_load<int8x8_t>(reinterpret_cast<int8_t*>(&vector) + 8);
}

template <typename Whole, typename Half>
inline Whole neon_combine(Half low, Half high) {
    Whole whole;
    std::memcpy(&whole, &low, 8);
    std::memcpy(reinterpret_cast<char*>(&whole) + 8, &high, 8);
    return whole;
}

inline int8x16_t vcombine_s8(int8x8_t low, int8x8_t high) { return neon_combine<int8x16_t>(low, high); }
inline uint8x16_t vcombine_u8(uint8x8_t low, uint8x8_t high) { return neon_combine<uint8x16_t>(low, high); }

// Indices past the table give 0.
template <int SIZE>
inline int8x16_t neon_look_up(const int8_t* table, uint8x16_t index) {
    int8x16_t found;
    for (int i = 0; i < 16; i++) found[i] = index[i] < SIZE ? table[index[i]] : int8_t{0};
    return found;
}

inline int8x16_t vqtbl1q_s8(int8x16_t table, uint8x16_t index) {
    return neon_look_up<16>(reinterpret_cast<int8_t*>(&table), index);
}
inline int8x16_t vqtbl4q_s8(int8x16x4_t table, uint8x16_t index) {
    return neon_look_up<64>(reinterpret_cast<int8_t*>(&table), index);
}

inline int16x8_t vmull_s8(int8x8_t a, int8x8_t b) {
    int16x8_t product;
    for (int i = 0; i < 8; i++) product[i] = static_cast<int16_t>(a[i] * b[i]);
    return product;
}

inline int32x4_t vpadalq_s16(int32x4_t sum, int16x8_t pairs) {
    for (int i = 0; i < 4; i++) sum[i] += pairs[2 * i] + pairs[2 * i + 1];
    return sum;
}

inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 16; i++) sum[i / 4] += a[i] * b[i];
    return sum;
}

template <typename Vector>
inline Vector neon_add_pairs(Vector a, Vector b) {
    return Vector{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
}

inline int32x4_t vpaddq_s32(int32x4_t a, int32x4_t b) { return neon_add_pairs(a, b); }
inline float32x4_t vpaddq_f32(float32x4_t a, float32x4_t b) { return neon_add_pairs(a, b); }
inline float32x4_t vcvtq_f32_s32(int32x4_t vector) { return __builtin_convertvector(vector, float32x4_t); }
inline float32x4_t vfmaq_n_f32(float32x4_t sum, float32x4_t a, float factor) {
    for (int i = 0; i < 4; i++) sum[i] = __builtin_fmaf(a[i], factor, sum[i]);
    return sum;
}
