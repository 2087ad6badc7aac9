/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "xxh3.h"

#include "zero.h"

#include <string.h>
#if defined(__x86_64__) && !defined(BG_PORTABLE)
#include <immintrin.h>
#endif

#define STRIPE 64
#define LANES 8
#define SECRET 192
#define STRIPES_PER_ROUND ((SECRET - STRIPE) / 8)
#define STRIPES (BG_SUM_BLOCK / STRIPE)

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 0xC2B2AE3D27D4EB4Fu
#define P64_3 0x165667B19E3779F9u
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u

_Static_assert(STRIPES % STRIPES_PER_ROUND == 0, "the last round is as long as the others, less its last stripe");

/* The specification's default secret. */
static const uint8_t default_secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static const uint64_t first_lanes[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

static inline uint64_t load(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static inline void store(uint8_t *at, uint64_t value)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    memcpy(at, &value, sizeof(value));
}

static void seeded_secret(uint64_t seed, uint8_t out[SECRET])
{
    for (int i = 0; i < SECRET; i += 16) {
        store(out + i, load(default_secret + i) + seed);
        store(out + i + 8, load(default_secret + i + 8) - seed);
    }
}

static inline uint64_t multiply_fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t merge(const uint64_t lanes[LANES], const uint8_t *secret, uint64_t start)
{
    for (int i = 0; i < LANES; i += 2)
        start += multiply_fold(lanes[i] ^ load(secret + 8 * i), lanes[i + 1] ^ load(secret + 8 * i + 8));
    start ^= start >> 37;
    start *= 0x165667919E3779F9u;
    return start ^ start >> 32;
}

static void finish(const uint64_t lanes[LANES], const uint8_t *secret, uint64_t out[2])
{
    out[0] = merge(lanes, secret + 11, BG_SUM_BLOCK * P64_1);
    out[1] = merge(lanes, secret + SECRET - STRIPE - 11, ~(BG_SUM_BLOCK * P64_2));
}

/*
 * Each round mixes in 16 stripes, each with the secret from 8 bytes further on, then scrambles the lanes. The last
 * round is short of its last stripe, which comes with a place of the secret of its own.
 */
#define ROUNDS(MIX, SCRAMBLE)                                                                                             \
    for (int s = 0; s < STRIPES - 1; s++) {                                                                               \
        MIX(in + s * STRIPE, secret + s % STRIPES_PER_ROUND * 8);                                                         \
        if (s % STRIPES_PER_ROUND == STRIPES_PER_ROUND - 1)                                                               \
            SCRAMBLE(secret + SECRET - STRIPE);                                                                           \
    }                                                                                                                     \
    MIX(in + (STRIPES - 1) * STRIPE, secret + SECRET - STRIPE - 7)

static void hash_portable(const void *block, uint64_t seed, uint64_t out[2])
{
    const uint8_t *in = block;
    uint8_t secret[SECRET];
    uint64_t lanes[LANES];
    memcpy(lanes, first_lanes, sizeof(lanes));
    seeded_secret(seed, secret);
#define MIX(data, key)                                                                                                    \
    for (int i = 0; i < LANES; i++) {                                                                                     \
        uint64_t value = load((data) + 8 * i), mixed = value ^ load((key) + 8 * i);                                       \
        lanes[i ^ 1] += value;                                                                                            \
        lanes[i] += (mixed & 0xffffffff) * (mixed >> 32);                                                                 \
    }
#define SCRAMBLE(key)                                                                                                     \
    for (int i = 0; i < LANES; i++)                                                                                       \
        lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ load((key) + 8 * i)) * P32_1;
    ROUNDS(MIX, SCRAMBLE)
#undef MIX
#undef SCRAMBLE
    finish(lanes, secret, out);
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
__attribute__((target("avx2"))) static inline __m256i mix_avx2(__m256i lanes, const uint8_t *data, const uint8_t *key)
{
    __m256i value = _mm256_loadu_si256((const __m256i *)data);
    __m256i mixed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)key));
    __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    return _mm256_add_epi64(product, _mm256_add_epi64(lanes, _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2))));
}

__attribute__((target("avx2"))) static inline __m256i scramble_avx2(__m256i lanes, const uint8_t *key)
{
    __m256i mixed = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), prime = _mm256_set1_epi32((int)P32_1);
    mixed = _mm256_xor_si256(mixed, _mm256_loadu_si256((const __m256i *)key));
    __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), high);
}

__attribute__((target("avx2"))) static void hash_avx2(const void *block, uint64_t seed, uint64_t out[2])
{
    const uint8_t *in = block;
    uint8_t secret[SECRET];
    uint64_t lanes[LANES];
    seeded_secret(seed, secret);
    __m256i a = _mm256_loadu_si256((const __m256i *)first_lanes), b = _mm256_loadu_si256((const __m256i *)(first_lanes + 4));
#define MIX(data, key) a = mix_avx2(a, data, key), b = mix_avx2(b, (data) + 32, (key) + 32)
#define SCRAMBLE(key) a = scramble_avx2(a, key), b = scramble_avx2(b, (key) + 32)
    ROUNDS(MIX, SCRAMBLE);
#undef MIX
#undef SCRAMBLE
    _mm256_storeu_si256((__m256i *)lanes, a);
    _mm256_storeu_si256((__m256i *)(lanes + 4), b);
    finish(lanes, secret, out);
}

__attribute__((target("avx512f"))) static inline __m512i mix_avx512(__m512i lanes, const uint8_t *data, const uint8_t *key)
{
    __m512i value = _mm512_loadu_si512(data), mixed = _mm512_xor_si512(value, _mm512_loadu_si512(key));
    __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
    __m512i swapped = _mm512_shuffle_epi32(value, (_MM_PERM_ENUM)_MM_SHUFFLE(1, 0, 3, 2));
    return _mm512_add_epi64(product, _mm512_add_epi64(lanes, swapped));
}

__attribute__((target("avx512f"))) static inline __m512i scramble_avx512(__m512i lanes, const uint8_t *key)
{
    __m512i mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47)), prime = _mm512_set1_epi32((int)P32_1);
    mixed = _mm512_xor_si512(mixed, _mm512_loadu_si512(key));
    __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime), 32);
    return _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), high);
}

__attribute__((target("avx512f"))) static void hash_avx512(const void *block, uint64_t seed, uint64_t out[2])
{
    const uint8_t *in = block;
    uint8_t secret[SECRET];
    uint64_t lanes[LANES];
    seeded_secret(seed, secret);
    __m512i a = _mm512_loadu_si512(first_lanes);
#define MIX(data, key) a = mix_avx512(a, data, key)
#define SCRAMBLE(key) a = scramble_avx512(a, key)
    ROUNDS(MIX, SCRAMBLE);
#undef MIX
#undef SCRAMBLE
    _mm512_storeu_si512(lanes, a);
    finish(lanes, secret, out);
}
#endif

size_t bg_xxh3_all(const bg_xxh3 *out[BG_XXH3_MAX])
{
    static const bg_xxh3 portable = {"portable", hash_portable};
    size_t n = 0;
#if defined(__x86_64__) && !defined(BG_PORTABLE)
    static const bg_xxh3 avx2 = {"avx2", hash_avx2}, avx512 = {"avx512", hash_avx512};
    if (__builtin_cpu_supports("avx512f"))
        out[n++] = &avx512;
    if (__builtin_cpu_supports("avx2"))
        out[n++] = &avx2;
#endif
    out[n++] = &portable;
    return n;
}

void bg_xxh3_add(const void *blocks, size_t count, uint64_t first, uint64_t sum[2])
{
    const bg_xxh3 *all[BG_XXH3_MAX];
    bg_xxh3_all(all);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *block = (const uint8_t *)blocks + i * BG_SUM_BLOCK;
        uint64_t hash[2];
        if (bg_is_zero(block, BG_SUM_BLOCK))
            continue;
        all[0]->hash(block, first + i, hash);
        sum[0] += hash[0];
        sum[1] += hash[1];
    }
}
