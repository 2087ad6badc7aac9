/* SPDX-FileCopyrightText: blockgraph contributors */
/* SPDX-License-Identifier: MIT */
#include "nbd_wire.h"

#include <endian.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define REQUEST_MAGIC 0x25609513U
#define SIMPLE_REPLY_MAGIC 0x67446698U
#define CHUNK_MAGIC 0x668e33efU
#define CHUNK_DONE 1
#define CHUNK_OFFSET_DATA 1
#define CHUNK_OFFSET_HOLE 2
#define CHUNK_ERROR 0x8001
#define ERROR_CHUNK_HEAD 26 /* without the text */

#define ERROR_PERM 1
#define ERROR_INVAL 22
#define ERROR_NOSPC 28
#define ERROR_SHUTDOWN 108

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

#define CHANGES 1 /* needs a writable export */
#define LIMITED 2 /* has a payload, here or there */

/* Clients are known to set FUA on anything, and are right to. */
static const struct {
    const char *name;
    unsigned flags, kind;
} commands[] = {
    [BG_NBD_READ] = {"READ", BG_NBD_FUA, LIMITED},
    [BG_NBD_WRITE] = {"WRITE", BG_NBD_FUA, CHANGES | LIMITED},
    [BG_NBD_FLUSH] = {"FLUSH", BG_NBD_FUA, 0},
    [BG_NBD_TRIM] = {"TRIM", BG_NBD_FUA, CHANGES},
    [BG_NBD_CACHE] = {"CACHE", BG_NBD_FUA, LIMITED},
    [BG_NBD_WRITE_ZEROES] = {"WRITE_ZEROES", BG_NBD_FUA | BG_NBD_NO_HOLE | BG_NBD_FAST_ZERO, CHANGES},
    [BG_NBD_BLOCK_STATUS] = {"BLOCK_STATUS", BG_NBD_FUA | BG_NBD_REQ_ONE, 0},
};

enum bg_nbd_refusal bg_nbd_check(const bg_nbd_settings *settings, const bg_nbd_header *header)
{
    unsigned command = header->command;
    if (command >= sizeof(commands) / sizeof(commands[0]) || !commands[command].name)
        return BG_NBD_UNKNOWN_COMMAND;
    unsigned flags = commands[command].flags, kind = commands[command].kind;
    if (command == BG_NBD_READ && settings->structured)
        flags |= BG_NBD_DF;
    if (header->flags & ~flags)
        return BG_NBD_BAD_FLAGS;
    if (kind & CHANGES && !settings->writable)
        return BG_NBD_READ_ONLY;
    if (kind & LIMITED && header->length > BG_NBD_MAX_PAYLOAD)
        return BG_NBD_TOO_MUCH;
    if (command == BG_NBD_FLUSH)
        return header->offset || header->length ? BG_NBD_NO_RANGE : BG_NBD_FINE;
    if (header->offset > settings->size || header->length > settings->size - header->offset)
        return BG_NBD_OUTSIDE;
    if (command == BG_NBD_BLOCK_STATUS && !settings->contexts)
        return BG_NBD_NO_CONTEXT;
    return command == BG_NBD_BLOCK_STATUS && !header->length ? BG_NBD_EMPTY : BG_NBD_FINE;
}

bool bg_nbd_native(const bg_nbd_header *header)
{
    return header->command == BG_NBD_FLUSH || (header->length && header->command != BG_NBD_BLOCK_STATUS);
}

/* The text is cut at `size`, which none reaches. */
static uint32_t explain(char *text, size_t size, uint64_t disk, const bg_nbd_header *header, enum bg_nbd_refusal why)
{
    int n = 0;
    switch (why) {
    case BG_NBD_UNKNOWN_COMMAND:
        n = snprintf(text, size, "unknown command %u", header->command);
        break;
    case BG_NBD_BAD_FLAGS:
        n = snprintf(text, size, "flags %#x are not valid for %s", header->flags, commands[header->command].name);
        break;
    case BG_NBD_READ_ONLY:
        n = snprintf(text, size, "the export is read-only");
        break;
    case BG_NBD_TOO_MUCH:
        n = snprintf(text, size, "%" PRIu32 " bytes at once; at most %d", header->length, BG_NBD_MAX_PAYLOAD);
        break;
    case BG_NBD_NO_RANGE:
        n = snprintf(text, size, "a flush has no offset and no length");
        break;
    case BG_NBD_OUTSIDE:
        n = snprintf(text, size, "%" PRIu32 " bytes at %" PRIu64 " pass the end of the disk (%" PRIu64 " bytes)",
                     header->length, header->offset, disk);
        break;
    case BG_NBD_NO_CONTEXT:
        n = snprintf(text, size, "no metadata context was selected");
        break;
    case BG_NBD_EMPTY:
        n = snprintf(text, size, "block status of an empty range");
        break;
    case BG_NBD_SHUT_DOWN:
        n = snprintf(text, size, "the server is being shut down");
        break;
    case BG_NBD_FINE:
        break;
    }
    return n < 0 ? 0 : (size_t)n < size ? (uint32_t)n : (uint32_t)size - 1;
}

static uint32_t error_of(uint16_t command, enum bg_nbd_refusal why)
{
    if (why == BG_NBD_READ_ONLY)
        return ERROR_PERM;
    if (why == BG_NBD_SHUT_DOWN)
        return ERROR_SHUTDOWN;
    bool grows = command == BG_NBD_WRITE || command == BG_NBD_WRITE_ZEROES;
    return why == BG_NBD_OUTSIDE && grows ? ERROR_NOSPC : ERROR_INVAL;
}

static size_t pack_simple(unsigned char *out, uint64_t cookie, uint32_t error)
{
    unsigned char *p = put32(out, SIMPLE_REPLY_MAGIC);
    p = put32(p, error);
    return (size_t)(put64(p, cookie) - out);
}

size_t bg_nbd_pack_simple(unsigned char *out, uint64_t cookie)
{
    return pack_simple(out, cookie, 0);
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

size_t bg_nbd_pack_refusal(unsigned char out[BG_NBD_MAX_REFUSAL], const bg_nbd_settings *settings,
                           const bg_nbd_header *header, enum bg_nbd_refusal why)
{
    uint32_t error = error_of(header->command, why);
    if (!settings->structured)
        return pack_simple(out, header->cookie, error);
    char text[BG_NBD_MAX_REFUSAL - ERROR_CHUNK_HEAD];
    uint32_t size = explain(text, sizeof(text), settings->size, header, why);
    unsigned char *p = put_chunk(out, CHUNK_ERROR, header->cookie, 6 + size);
    p = put32(p, error);
    p = put16(p, (uint16_t)size);
    memcpy(p, text, size);
    return (size_t)(p - out) + size;
}
