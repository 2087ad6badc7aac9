/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "bitmap_blocks.h"
#include "bitmap_internal.h"

#include <endian.h>
#include <string.h>
#if defined(__x86_64__) && !defined(BG_PORTABLE)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Bits 0..31 to two each. */
INLINE uint64_t doubled(uint64_t x)
{
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
    x = (x | x << 2) & 0x3333333333333333;
    x = (x | x << 1) & 0x5555555555555555;
    return x | x << 1;
}

/* Pairs of bits to bits 0..31. */
INLINE uint64_t halved(uint64_t x)
{
    x = (x | x >> 1) & 0x5555555555555555;
    x = (x | x >> 1) & 0x3333333333333333;
    x = (x | x >> 2) & 0x0f0f0f0f0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (x | x >> 16) & 0x00000000ffffffff;
}

INLINE uint64_t spread_portable(uint64_t x, unsigned k)
{
    for (unsigned i = 0; i < k; i++)
        x = doubled(x & 0xffffffff);
    return x;
}

INLINE uint64_t fold_portable(uint64_t x, unsigned k)
{
    for (unsigned i = 0; i < k; i++)
        x = halved(x);
    return x;
}

/* Stored one by one: see word_store. */
INLINE void put(block_outcome *out, uint64_t *into, unsigned i, uint64_t more)
{
    uint64_t old = into[i], now = old | more;
    out->turned += (uint64_t)__builtin_popcountll(more & ~old);
    out->used |= (uint64_t)(now != 0) << i;
    word_store(&into[i], now);
}

INLINE uint64_t word_at(const void *from, size_t i)
{
    uint64_t word;
    memcpy(&word, (const char *)from + i * sizeof(word), sizeof(word));
    return word;
}

INLINE block_outcome same_body(uint64_t *into, const void *from)
{
    block_outcome out = {0, 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i++)
        put(&out, into, i, word_at(from, i));
    return out;
}

INLINE block_outcome spread_body(uint64_t *into, const void *from, unsigned k, uint64_t (*spread)(uint64_t, unsigned))
{
    block_outcome out = {0, 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i += 1u << k) {
        uint64_t word = word_at(from, i >> k);
        for (unsigned j = 0; j < 1u << k; j++, word >>= 64 >> k)
            put(&out, into, i + j, spread(word, k));
    }
    return out;
}

INLINE block_outcome fold_body(uint64_t *into, const void *from, unsigned k, uint64_t (*fold)(uint64_t, unsigned))
{
    block_outcome out = {0, 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i++) {
        uint64_t word = 0;
        for (unsigned j = 0; j < 1u << k; j++)
            word |= fold(word_at(from, (i << k) + j), k) << (j * (64 >> k));
        put(&out, into, i, word);
    }
    return out;
}

INLINE block_outcome replace_body(uint64_t *into, const void *from)
{
    block_outcome out = {0, 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i++) {
        uint64_t old = into[i], now = le64toh(word_at(from, i));
        out.turned += (uint64_t)__builtin_popcountll(now) - (uint64_t)__builtin_popcountll(old);
        out.used |= (uint64_t)(now != 0) << i;
        word_store(&into[i], now);
    }
    return out;
}

static block_outcome make_portable(uint64_t *into, const void *from, block_method method, unsigned k)
{
    switch (method) {
    case BLOCK_SPREAD:
        return spread_body(into, from, k, spread_portable);
    case BLOCK_FOLD:
        return fold_body(into, from, k, fold_portable);
    case BLOCK_REPLACE:
        return replace_body(into, from);
    default:
        return same_body(into, from);
    }
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
#define BMI2 __attribute__((target("bmi,bmi2,popcnt")))

/* Every 2^k-th bit. */
INLINE uint64_t every(unsigned k)
{
    static const uint64_t mask[] = {~(uint64_t)0,       0x5555555555555555, 0x1111111111111111, 0x0101010101010101,
                                    0x0001000100010001, 0x0000000100000001, 1};
    return mask[k];
}

BMI2 INLINE uint64_t spread_bmi2(uint64_t x, unsigned k)
{
    uint64_t starts = _pdep_u64(x, every(k));
    return k == 6 ? -starts : (starts << (1u << k % 6)) - starts;
}

BMI2 INLINE uint64_t fold_bmi2(uint64_t x, unsigned k)
{
    for (unsigned i = 0; i < k; i++)
        x |= x >> (1u << i);
    return _pext_u64(x, every(k));
}

/* `k` must be a constant where the words are worked on. */
BMI2 INLINE block_outcome spread_or_fold_bmi2(uint64_t *into, const void *from, block_method method, unsigned k)
{
    return method == BLOCK_SPREAD ? spread_body(into, from, k, spread_bmi2) : fold_body(into, from, k, fold_bmi2);
}

BMI2 static block_outcome make_bmi2(uint64_t *into, const void *from, block_method method, unsigned k)
{
    if (method == BLOCK_SAME)
        return same_body(into, from);
    if (method == BLOCK_REPLACE)
        return replace_body(into, from);
    switch (k) {
    case 1:
        return spread_or_fold_bmi2(into, from, method, 1);
    case 2:
        return spread_or_fold_bmi2(into, from, method, 2);
    case 3:
        return spread_or_fold_bmi2(into, from, method, 3);
    case 4:
        return spread_or_fold_bmi2(into, from, method, 4);
    case 5:
        return spread_or_fold_bmi2(into, from, method, 5);
    default:
        return spread_body(into, from, 6, spread_bmi2);
    }
}

/*
 * A line of the cache at once. Its words are stored whole, as word_store has to: the store is aligned. ThreadSanitizer does not
 * know that.
 */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,bmi,bmi2,popcnt"), \
                              no_sanitize("thread")))
#define LINE 8 /* words */

typedef struct {
    __m512i turned; /* for each of the words of a line */
    uint64_t used;
} line_outcome;

AVX512 INLINE void put_line(line_outcome *out, uint64_t *into, unsigned i, __m512i more)
{
    __m512i old = _mm512_load_si512(into + i), now = _mm512_or_si512(old, more);
    out->turned = _mm512_add_epi64(out->turned, _mm512_popcnt_epi64(_mm512_andnot_si512(old, more)));
    out->used |= (uint64_t)_mm512_test_epi64_mask(now, now) << i;
    _mm512_store_si512(into + i, now);
}

AVX512 INLINE void replace_line(line_outcome *out, uint64_t *into, unsigned i, __m512i now)
{
    __m512i old = _mm512_load_si512(into + i);
    __m512i turned = _mm512_sub_epi64(_mm512_popcnt_epi64(now), _mm512_popcnt_epi64(old));
    out->turned = _mm512_add_epi64(out->turned, turned);
    out->used |= (uint64_t)_mm512_test_epi64_mask(now, now) << i;
    _mm512_store_si512(into + i, now);
}

/* Each bit to two. */
AVX512 INLINE __m256i double_16(__m128i bytes)
{
    const __m128i of_nibble = _mm_setr_epi8(0x00, 0x03, 0x0c, 0x0f, 0x30, 0x33, 0x3c, 0x3f, (char)0xc0, (char)0xc3, (char)0xcc,
                                            (char)0xcf, (char)0xf0, (char)0xf3, (char)0xfc, (char)0xff);
    __m256i x = _mm256_cvtepu8_epi16(bytes);
    x = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0f));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(of_nibble), x);
}

AVX512 INLINE __m512i double_32(__m256i bytes)
{
    __m256i low = double_16(_mm256_castsi256_si128(bytes)), high = double_16(_mm256_extracti128_si256(bytes, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The line that so many bytes at `from` are spread to. */
AVX512 INLINE __m512i spread_line(const void *from, unsigned k)
{
    uint64_t bits = 0;
    if (k == 1)
        return double_32(_mm256_loadu_si256(from));
    if (k == 2)
        return double_32(double_16(_mm_loadu_si128(from)));
    memcpy(&bits, from, 64u >> k);
    switch (k) {
    case 3:
        return _mm512_movm_epi8(bits);
    case 4:
        return _mm512_movm_epi16((__mmask32)bits);
    case 5:
        return _mm512_movm_epi32((__mmask16)bits);
    default:
        return _mm512_movm_epi64((__mmask8)bits);
    }
}

AVX512 INLINE __m256i halve_64(__m512i x)
{
    x = _mm512_and_si512(_mm512_or_si512(x, _mm512_srli_epi64(x, 1)), _mm512_set1_epi8(0x55));
    x = _mm512_and_si512(_mm512_or_si512(x, _mm512_srli_epi64(x, 1)), _mm512_set1_epi8(0x33));
    x = _mm512_and_si512(_mm512_or_si512(x, _mm512_srli_epi64(x, 2)), _mm512_set1_epi8(0x0f));
    /* Pairs of bytes with four bits each: the low one and 16 times the high one. */
    return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(x, _mm512_set1_epi16(0x1001)));
}

AVX512 INLINE __m512i halve_lines(const __m512i *lines)
{
    __m256i low = halve_64(_mm512_loadu_si512(lines)), high = halve_64(_mm512_loadu_si512(lines + 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The word that 2^k words are folded to, k >= 3. */
AVX512 INLINE uint64_t fold_word(const __m512i *lines, unsigned k)
{
    uint64_t word = 0;
    for (unsigned i = 0; i < 1u << (k - 3); i++) {
        __m512i line = _mm512_loadu_si512(lines + i);
        if (k == 3)
            word |= _mm512_test_epi8_mask(line, line);
        else if (k == 4)
            word |= (uint64_t)_mm512_test_epi16_mask(line, line) << i * 32;
        else
            word |= (uint64_t)_mm512_test_epi32_mask(line, line) << i * 16;
    }
    return word;
}

AVX512 INLINE block_outcome spread_avx512(uint64_t *into, const void *from, unsigned k)
{
    line_outcome out = {_mm512_setzero_si512(), 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i += LINE)
        put_line(&out, into, i, spread_line((const char *)from + (i * 8 >> k), k));
    return (block_outcome){(uint64_t)_mm512_reduce_add_epi64(out.turned), out.used};
}

AVX512 INLINE block_outcome fold_words_avx512(uint64_t *into, const void *from, unsigned k)
{
    block_outcome out = {0, 0};
    for (unsigned i = 0; i < BLOCK_WORDS; i++)
        put(&out, into, i, fold_word((const __m512i *)from + ((size_t)i << (k - 3)), k));
    return out;
}

AVX512 static block_outcome make_lines_avx512(uint64_t *into, const void *from, block_method method, unsigned k)
{
    line_outcome out = {_mm512_setzero_si512(), 0};
    const __m512i *lines = from;
    for (unsigned i = 0; i < BLOCK_WORDS; i += LINE) {
        if (method == BLOCK_REPLACE) {
            replace_line(&out, into, i, _mm512_loadu_si512(lines + i / LINE));
        } else if (method == BLOCK_SAME) {
            put_line(&out, into, i, _mm512_loadu_si512(lines + i / LINE));
        } else if (k == 1) {
            put_line(&out, into, i, halve_lines(lines + i / LINE * 2));
        } else {
            __m512i once[2] = {halve_lines(lines + i / LINE * 4), halve_lines(lines + i / LINE * 4 + 2)};
            put_line(&out, into, i, halve_lines(once));
        }
    }
    return (block_outcome){(uint64_t)_mm512_reduce_add_epi64(out.turned), out.used};
}

AVX512 static block_outcome make_avx512(uint64_t *into, const void *from, block_method method, unsigned k)
{
    if (method == BLOCK_FOLD && k >= 3)
        return k == 3   ? fold_words_avx512(into, from, 3)
               : k == 4 ? fold_words_avx512(into, from, 4)
                        : fold_words_avx512(into, from, 5);
    if (method != BLOCK_SPREAD)
        return make_lines_avx512(into, from, method, k);
    switch (k) {
    case 1:
        return spread_avx512(into, from, 1);
    case 2:
        return spread_avx512(into, from, 2);
    case 3:
        return spread_avx512(into, from, 3);
    case 4:
        return spread_avx512(into, from, 4);
    case 5:
        return spread_avx512(into, from, 5);
    default:
        return spread_avx512(into, from, 6);
    }
}
#endif

size_t block_makers(const block_maker *out[BLOCK_MAKERS])
{
    static const block_maker portable = {"portable", make_portable};
    size_t n = 0;
#if defined(__x86_64__) && !defined(BG_PORTABLE)
    static const block_maker bmi2 = {"bmi2", make_bmi2}, avx512 = {"avx512", make_avx512};
    bool bits = __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (bits && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vpopcntdq"))
        out[n++] = &avx512;
    /* AMD's processors before Zen 3 do pdep and pext bit by bit. */
    if (bits && !__builtin_cpu_is("znver1") && !__builtin_cpu_is("znver2") && !__builtin_cpu_is("bdver4"))
        out[n++] = &bmi2;
#endif
    out[n++] = &portable;
    return n;
}
