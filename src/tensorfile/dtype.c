/* SPDX-License-Identifier: Apache-2.0 */
/* Element types.  The 16-bit formats are converted by their bits, so that no compiler support is needed. */
#include "tensorfile/dtype.h"

#include <assert.h>
#include <stdint.h>
#include <string.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [LOGLIN_TENSOR_F32] = {"F32", 4}, [LOGLIN_TENSOR_F16] = {"F16", 2}, [LOGLIN_TENSOR_BF16] = {"BF16", 2},
    [LOGLIN_TENSOR_I32] = {"I32", 4}, [LOGLIN_TENSOR_I64] = {"I64", 8},
};

const char *loglin_tensor_dtype_name(loglin_tensor_dtype dtype) {
    return dtypes[dtype].name;
}

size_t loglin_tensor_dtype_size(loglin_tensor_dtype dtype) {
    return dtypes[dtype].size;
}

bool loglin_tensor_dtype_from_name(const char *name, loglin_tensor_dtype *dtype) {
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; ++i) {
        if (strcmp(name, dtypes[i].name) == 0) {
            *dtype = (loglin_tensor_dtype)i;
            return true;
        }
    }
    return false;
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* F16: 1 sign bit, 5 exponent bits (bias 15), 10 fraction bits. */
static float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000U) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fU;
    const uint32_t fraction = half & 0x3ffU;
    if (exponent == 0) { /* zero or subnormal: fraction * 2^-24, exact in float */
        const float magnitude = (float)fraction * 0x1p-24F;
        return sign != 0 ? -magnitude : magnitude;
    }
    if (exponent == 0x1f) {
        return float_of_bits(sign | 0x7f800000U | (fraction << 13));
    }
    return float_of_bits(sign | ((exponent + 112U) << 23) | (fraction << 13));
}

static uint16_t half_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) { /* NaN: quiet */
        return (uint16_t)(sign | 0x7e00U);
    }
    if (magnitude >= 0x477ff000U) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00U);
    }
    if (magnitude < 0x38800000U) { /* below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(magnitude) + 0.5F) - 0x3f000000U));
    }
    const uint32_t odd = (magnitude >> 13) & 1U;
    return (uint16_t)(sign | ((magnitude - 0x38000000U + 0xfffU + odd) >> 13));
}

/* BF16: the upper half of a float. */
static float float_of_bfloat(uint16_t bfloat) {
    return float_of_bits((uint32_t)bfloat << 16);
}

static uint16_t bfloat_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffU) > 0x7f800000U) { /* NaN: quiet */
        return (uint16_t)((bits >> 16) | 0x40U);
    }
    return (uint16_t)((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

void loglin_tensor_to_float(loglin_tensor_dtype dtype, const void *from, size_t count, float *to) {
    if (dtype == LOGLIN_TENSOR_F32) {
        if (count > 0) {
            memcpy(to, from, count * sizeof *to);
        }
        return;
    }
    assert(dtype == LOGLIN_TENSOR_F16 || dtype == LOGLIN_TENSOR_BF16);
    const unsigned char *bytes = from;
    for (size_t i = 0; i < count; ++i) {
        uint16_t bits;
        memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
        to[i] = dtype == LOGLIN_TENSOR_F16 ? float_of_half(bits) : float_of_bfloat(bits);
    }
}

void loglin_tensor_from_float(loglin_tensor_dtype dtype, const float *from, size_t count, void *to) {
    if (dtype == LOGLIN_TENSOR_F32) {
        if (count > 0) {
            memcpy(to, from, count * sizeof *from);
        }
        return;
    }
    assert(dtype == LOGLIN_TENSOR_F16 || dtype == LOGLIN_TENSOR_BF16);
    unsigned char *bytes = to;
    for (size_t i = 0; i < count; ++i) {
        const uint16_t bits = dtype == LOGLIN_TENSOR_F16 ? half_of_float(from[i]) : bfloat_of_float(from[i]);
        memcpy(bytes + i * sizeof bits, &bits, sizeof bits);
    }
}
