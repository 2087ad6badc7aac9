/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "bitmap_edges.h"

#include <string.h>
#if defined(__x86_64__) && !defined(BG_PORTABLE)
#include <immintrin.h>
#endif

/* Where the bits of a word differ from the bit before each. word[-1] is readable. */
static inline uint64_t edges_of(const uint64_t *word)
{
    return word[0] ^ (word[0] << 1 | word[-1] >> 63);
}

static size_t decode_portable(const uint64_t *words, size_t count, uint64_t base, unsigned shift, uint64_t *out, size_t room)
{
    uint64_t *at = out, *last = out + room - EDGES_SLACK;
    for (size_t i = 0; i < count && at <= last; i++)
        for (uint64_t edges = edges_of(words + i); edges; edges &= edges - 1)
            *at++ = (base + 64 * i + (uint64_t)__builtin_ctzll(edges)) << shift;
    return (size_t)(at - out);
}

#if defined(__x86_64__) && !defined(BG_PORTABLE)
/*
 * Branches on random bits are mispredicted: the words that have edges are found first, without a branch, and each of them writes
 * four values always and counts those that are real.
 */
__attribute__((target("avx2,bmi,popcnt"))) static size_t decode_avx2(const uint64_t *words, size_t count, uint64_t base,
                                                                     unsigned shift, uint64_t *out, size_t room)
{
    uint64_t *at = out, *last = out + room - EDGES_SLACK;
    for (size_t start = 0; start < count && at <= last; start += 64) {
        size_t done = start, stop = count - start < 64 ? count : start + 64;
        uint64_t marked = 0;
        for (; done + 4 <= stop; done += 4) {
            __m256i here = _mm256_loadu_si256((const __m256i *)(words + done));
            __m256i before = _mm256_loadu_si256((const __m256i *)(words + done - 1));
            __m256i shifted = _mm256_or_si256(_mm256_slli_epi64(here, 1), _mm256_srli_epi64(before, 63));
            __m256i same = _mm256_cmpeq_epi64(here, shifted);
            marked |= (uint64_t)(_mm256_movemask_pd(_mm256_castsi256_pd(same)) ^ 15) << (done - start);
        }
        for (; done < stop; done++)
            marked |= (uint64_t)(edges_of(words + done) != 0) << (done - start);
        for (; marked && at <= last; marked &= marked - 1) {
            size_t i = start + _tzcnt_u64(marked);
            uint64_t edges = edges_of(words + i), first = base + 64 * i;
            uint64_t *next = at + __builtin_popcountll(edges);
            for (int k = 0; k < 4; k++, edges &= edges - 1)
                *at++ = (first + _tzcnt_u64(edges)) << shift;
            for (; edges; edges &= edges - 1)
                *at++ = (first + _tzcnt_u64(edges)) << shift;
            at = next;
        }
    }
    return (size_t)(at - out);
}

/*
 * AVX-512 with VBMI2, which compresses bytes. Two passes, so that no branch depends on how many edges there are where: the
 * bytes that have edges are gathered with their indices, then eight of them at a time are decoded. To compress the numbers
 * 0..63 by eight bytes of edges gives (which of the bytes) * 8 + bit for each edge.
 */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))
#define LINE 8     /* words in a vector */
#define AHEAD 4096 /* bytes: the second pass leaves memory idle, and what the processor reads ahead by itself ends at a page */

typedef struct {
    uint8_t edges[EDGES_WORDS * 8 + 64];
    uint16_t index[EDGES_WORDS * 8 + 64]; /* of the byte in the words */
    size_t count;
} edge_bytes;

AVX512 static inline __m512i numbers_0_to_63(void)
{
    const __m128i sixteen = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i steps = _mm512_setr_epi32(0, 0, 0, 0, 0x10101010, 0x10101010, 0x10101010, 0x10101010, 0x20202020, 0x20202020,
                                            0x20202020, 0x20202020, 0x30303030, 0x30303030, 0x30303030, 0x30303030);
    return _mm512_add_epi8(_mm512_broadcast_i32x4(sixteen), steps);
}

/* Append those bytes of a line that are not 0 and allowed. `first`: the index of its first byte, in each element. */
AVX512 static inline __attribute__((always_inline)) size_t gather_line(edge_bytes *out, size_t kept, __m512i edges,
                                                                       uint64_t allowed, __m512i first)
{
    uint64_t some = _mm512_test_epi8_mask(edges, edges) & allowed;
    __m512i order = _mm512_maskz_compress_epi8(some, numbers_0_to_63()), packed = _mm512_permutexvar_epi8(order, edges);
    size_t n = (size_t)__builtin_popcountll(some);
    uint8_t *bytes = out->edges + kept;
    uint16_t *index = out->index + kept;
    _mm_storeu_si128((__m128i *)bytes, _mm512_castsi512_si128(packed));
    _mm256_storeu_si256((__m256i *)index, _mm256_add_epi16(_mm256_cvtepu8_epi16(_mm512_castsi512_si128(order)),
                                                           _mm512_castsi512_si256(first)));
    if (__builtin_expect(n > 16, 0)) {
        __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(order));
        __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(order, 1));
        _mm512_storeu_si512(bytes, packed);
        _mm512_storeu_si512(index, _mm512_add_epi16(low, first));
        _mm512_storeu_si512(index + 32, _mm512_add_epi16(high, first));
    }
    return kept + n;
}

AVX512 static void gather(const uint64_t *words, size_t count, edge_bytes *out)
{
    size_t kept = 0, i = 0;
    __m512i before = _mm512_set1_epi64((long long)words[-1]), first = _mm512_setzero_si512(), here, shifted;
    for (; i + LINE <= count; i += LINE) {
        _mm_prefetch((const char *)(words + i) + AHEAD, _MM_HINT_T0);
        here = _mm512_loadu_si512(words + i);
        shifted = _mm512_shldi_epi64(here, _mm512_alignr_epi64(here, before, LINE - 1), 1);
        kept = gather_line(out, kept, _mm512_xor_si512(here, shifted), ~(uint64_t)0, first);
        first = _mm512_add_epi16(first, _mm512_set1_epi16(64));
        before = here;
    }
    if (i < count) {
        here = _mm512_maskz_loadu_epi64((__mmask8)((1u << (count - i)) - 1), words + i);
        shifted = _mm512_shldi_epi64(here, _mm512_alignr_epi64(here, before, LINE - 1), 1);
        kept = gather_line(out, kept, _mm512_xor_si512(here, shifted), ~(uint64_t)0 >> (64 - 8 * (count - i)), first);
    }
    /* Eight are read at a time. */
    memset(out->edges + kept, 0, 8);
    out->count = kept;
}

AVX512 static size_t decode_avx512(const uint64_t *words, size_t count, uint64_t base, unsigned shift, uint64_t *out,
                                   size_t room)
{
    const __m512i numbers = numbers_0_to_63(), seven = _mm512_set1_epi16(7);
    const __m512i start = _mm512_set1_epi64((long long)(base << shift));
    const __m128i by = _mm_cvtsi32_si128((int)shift);
    edge_bytes found;
    gather(words, count, &found);
    size_t n = 0, last = room - EDGES_SLACK;
    for (size_t i = 0; i < found.count && n <= last; i += 8) {
        uint64_t edges, *to = out + n;
        memcpy(&edges, found.edges + i, sizeof(edges));
        __m512i index = _mm512_castsi128_si512(_mm_slli_epi16(_mm_loadu_si128((const __m128i *)(found.index + i)), 3));
        __m512i packed = _mm512_maskz_compress_epi8(edges, numbers);
        __m512i bit = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed));
        /* index * 8 | bit & 7 */
        __m512i place = _mm512_ternarylogic_epi32(_mm512_permutexvar_epi16(_mm512_srli_epi16(bit, 3), index), bit, seven, 0xf8);
        __m512i a = _mm512_cvtepu16_epi64(_mm512_castsi512_si128(place));
        __m512i b = _mm512_cvtepu16_epi64(_mm512_extracti32x4_epi32(place, 1));
        _mm512_storeu_si512(to, _mm512_add_epi64(_mm512_sll_epi64(a, by), start));
        _mm512_storeu_si512(to + 8, _mm512_add_epi64(_mm512_sll_epi64(b, by), start));
        size_t some = (size_t)__builtin_popcountll(edges);
        n += some;
        if (__builtin_expect(some > 16, 0)) {
            uint16_t rest[64];
            _mm512_storeu_si512(rest, place);
            bit = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(packed, 1));
            place = _mm512_ternarylogic_epi32(_mm512_permutexvar_epi16(_mm512_srli_epi16(bit, 3), index), bit, seven, 0xf8);
            _mm512_storeu_si512(rest + 32, place);
            for (size_t k = 16; k < some; k += 8) {
                a = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)(rest + k)));
                _mm512_storeu_si512(to + k, _mm512_add_epi64(_mm512_sll_epi64(a, by), start));
            }
        }
    }
    return n;
}
#endif

size_t edge_decoders(const edge_decoder *out[EDGE_DECODERS])
{
    static const edge_decoder portable = {"portable", decode_portable};
    size_t n = 0;
#if defined(__x86_64__) && !defined(BG_PORTABLE)
    static const edge_decoder avx2 = {"avx2", decode_avx2}, avx512 = {"avx512", decode_avx512};
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt"))
        out[n++] = &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt"))
        out[n++] = &avx2;
#endif
    out[n++] = &portable;
    return n;
}
