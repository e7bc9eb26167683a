// The number formats of an engine's tensors, and logits as fp32.
#pragma once

#include <cstddef>
#include <string>

namespace gqa {

enum class Number { int32, int64, fp16, bf16, fp32, int8, fp8 };  // the last two: codes of a cache

std::size_t bytes_of(Number number);
Number number_from(std::string const& name, std::string const& where);  // "int32", "float16", ...; throws Error

// `count` numbers at `source` as fp32. Throws Error for integers.
void to_fp32(Number number, void const* source, std::size_t count, float* out);

}  // namespace gqa
