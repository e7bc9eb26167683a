// One compiled kernel: the text lines of a .gqacubin file and its code. Format: plugins/grouped_attention/cubin.py.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gqa {

struct Cubin {
    std::string kernel;  // append, prefill, decode, combine, score, select or long_prefill
    std::string name;    // the function's name in the module
    int capability = 0;
    int shared_bytes = 0;
    int threads = 0;
    int tile_rows = 0;
    int scratch_pointers = 0;  // that many null pointers follow the arguments
    std::vector<std::pair<std::string, std::string>> arguments;  // (name, "*bf16" | "i32" | "fp32"), in order
    std::map<std::string, std::string> constants;
    std::string code;
};

// Throws Error for data that is not such a file, is cut short, or was altered.
Cubin parse_cubin(std::string_view data, std::string const& where = "cubin");

}  // namespace gqa
