/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "nbd_wire.h"

#include <endian.h>
#include <string.h>

#define REQUEST_MAGIC 0x25609513U
#define SIMPLE_REPLY_MAGIC 0x67446698U
#define CHUNK_MAGIC 0x668e33efU
#define CHUNK_DONE 1
#define CHUNK_OFFSET_DATA 1
#define CHUNK_OFFSET_HOLE 2

static uint16_t get16(const unsigned char *p)
{
    uint16_t value;
    memcpy(&value, p, sizeof(value));
    return be16toh(value);
}

static uint32_t get32(const unsigned char *p)
{
    uint32_t value;
    memcpy(&value, p, sizeof(value));
    return be32toh(value);
}

static uint64_t get64(const unsigned char *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof(value));
    return be64toh(value);
}

static unsigned char *put16(unsigned char *p, uint16_t value)
{
    value = htobe16(value);
    return (unsigned char *)memcpy(p, &value, sizeof(value)) + sizeof(value);
}

static unsigned char *put32(unsigned char *p, uint32_t value)
{
    value = htobe32(value);
    return (unsigned char *)memcpy(p, &value, sizeof(value)) + sizeof(value);
}

static unsigned char *put64(unsigned char *p, uint64_t value)
{
    value = htobe64(value);
    return (unsigned char *)memcpy(p, &value, sizeof(value)) + sizeof(value);
}

bool bg_nbd_parse(const unsigned char bytes[BG_NBD_HEADER], bg_nbd_header *out)
{
    out->flags = get16(bytes + 4);
    out->command = get16(bytes + 6);
    out->cookie = get64(bytes + 8);
    out->offset = get64(bytes + 16);
    out->length = get32(bytes + 24);
    return get32(bytes) == REQUEST_MAGIC;
}

bool bg_nbd_regular(const bg_nbd_settings *settings, const bg_nbd_header *header)
{
    unsigned flags = BG_NBD_FUA;
    bool changes = false, payload = true;
    switch (header->command) {
    case BG_NBD_READ:
        flags |= settings->structured ? BG_NBD_DF : 0;
        break;
    case BG_NBD_WRITE:
        changes = true;
        break;
    case BG_NBD_CACHE:
        break;
    case BG_NBD_FLUSH:
        return !(header->flags & ~flags) && !header->offset && !header->length;
    case BG_NBD_WRITE_ZEROES:
        flags |= BG_NBD_NO_HOLE | BG_NBD_FAST_ZERO;
        /* fall through */
    case BG_NBD_TRIM:
        changes = true;
        payload = false;
        break;
    default:
        return false;
    }
    return !(header->flags & ~flags) && (!changes || settings->writable) && header->length > 0 &&
           (!payload || header->length <= BG_NBD_MAX_PAYLOAD) && header->offset <= settings->size &&
           header->length <= settings->size - header->offset;
}

size_t bg_nbd_pack_simple(unsigned char *out, uint64_t cookie)
{
    unsigned char *p = put32(out, SIMPLE_REPLY_MAGIC);
    p = put32(p, 0);
    return (size_t)(put64(p, cookie) - out);
}

static unsigned char *put_chunk(unsigned char *p, uint16_t type, uint64_t cookie, uint32_t length)
{
    p = put32(p, CHUNK_MAGIC);
    p = put16(p, CHUNK_DONE);
    p = put16(p, type);
    p = put64(p, cookie);
    return put32(p, length);
}

size_t bg_nbd_pack_data(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length)
{
    unsigned char *p = put_chunk(out, CHUNK_OFFSET_DATA, cookie, length + 8);
    return (size_t)(put64(p, offset) - out);
}

size_t bg_nbd_pack_hole(unsigned char *out, uint64_t cookie, uint64_t offset, uint32_t length)
{
    unsigned char *p = put_chunk(out, CHUNK_OFFSET_HOLE, cookie, 12);
    p = put64(p, offset);
    return (size_t)(put32(p, length) - out);
}
