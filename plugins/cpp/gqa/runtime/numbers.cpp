#include "gqa/runtime/numbers.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "gqa/core/error.h"

namespace gqa {
namespace {

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float from_bf16(std::uint16_t half) { return from_bits(std::uint32_t{half} << 16); }

float from_fp16(std::uint16_t half) {
    std::uint32_t const sign = std::uint32_t{half & 0x8000u} << 16;
    std::uint32_t const exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    if (exponent == 0) {  // zero and subnormal: fraction * 2^-24, exactly
        float const value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    std::uint32_t const wide = exponent == 31 ? 255 : exponent + 112;
    return from_bits(sign | wide << 23 | fraction << 13);
}

template <typename Half, typename Convert>
void widen(void const* source, std::size_t count, float* out, Convert convert) {
    auto const* const halves = static_cast<Half const*>(source);
    for (std::size_t i = 0; i < count; ++i) out[i] = convert(halves[i]);
}

}  // namespace

std::size_t bytes_of(Number number) {
    switch (number) {
        case Number::int64: return 8;
        case Number::int32: case Number::fp32: return 4;
        case Number::int8: case Number::fp8: return 1;
        default: return 2;
    }
}

Number number_from(std::string const& name, std::string const& where) {
    static std::map<std::string, Number> const names{{"int32", Number::int32},   {"int64", Number::int64},
                                                     {"float16", Number::fp16},  {"fp16", Number::fp16},
                                                     {"bfloat16", Number::bf16}, {"bf16", Number::bf16},
                                                     {"float32", Number::fp32},  {"fp32", Number::fp32},
                                                     {"int8", Number::int8},     {"float8_e4m3fn", Number::fp8}};
    auto const found = names.find(name);
    if (found != names.end()) return found->second;
    throw Error("number format '" + name + "' is not known", where, "build the engine with this version of gqa-export");
}

void to_fp32(Number number, void const* source, std::size_t count, float* out) {
    switch (number) {
        case Number::fp32: std::memcpy(out, source, count * sizeof(float)); return;
        case Number::fp16: widen<std::uint16_t>(source, count, out, from_fp16); return;
        case Number::bf16: widen<std::uint16_t>(source, count, out, from_bf16); return;
        default: throw Error("logits are integers", "the engine's output", "build the engine again");
    }
}

}  // namespace gqa
