#include "gqa/attention/cubin.h"

#include <limits>

#include "gqa/core/error.h"
#include "gqa/core/sha256.h"
#include "gqa/core/text.h"

namespace gqa {
namespace {

constexpr std::string_view kMagic = "gqa-cubin 1";
constexpr char kFix[] = "compile it again: python -m gqa_plugins.grouped_attention.cubin --help";

class Facts {
public:
    explicit Facts(std::string const& where) : where_(where) {}

    void add(std::string_view key, std::string_view value) { facts_[std::string(key)] = value; }

    std::string text(char const* key) const {
        auto const found = facts_.find(key);
        if (found == facts_.end()) incomplete(std::string("'") + key + "'");
        return found->second;
    }

    int integer(char const* key) const {
        std::string const value = text(key);
        auto const parsed = number(value);
        if (!parsed || *parsed > std::numeric_limits<int>::max()) incomplete(std::string(key) + " is '" + value + "'");
        return static_cast<int>(*parsed);
    }

private:
    [[noreturn]] void incomplete(std::string const& what) const {
        throw Error("the kernel file's lines are incomplete: " + what, where_, kFix);
    }

    std::string where_;
    std::map<std::string, std::string> facts_;
};

}  // namespace

Cubin parse_cubin(std::string_view data, std::string const& where) {
    auto [head, code] = cut(data, "\n\n");
    bool const separated = head.size() != data.size();
    if (next_line(head) != kMagic || !separated) {
        throw Error("not a kernel file of this version: it does not begin with '" + std::string(kMagic) + "'", where,
                    kFix);
    }
    Cubin cubin;
    Facts facts(where);
    while (!head.empty()) {
        auto const [key, rest] = cut(next_line(head), " ");
        auto const [name, value] = cut(rest, " ");
        if (key == "argument") {
            cubin.arguments.emplace_back(name, value);
        } else if (key == "constant") {
            cubin.constants[std::string(name)] = value;
        } else {
            facts.add(key, rest);
        }
    }
    int const code_bytes = facts.integer("code_bytes");
    if (code.size() != static_cast<std::size_t>(code_bytes) || sha256_hex(code) != facts.text("code_sha256")) {
        throw Error("the kernel file is cut short or altered: its code does not match its sha256", where, kFix);
    }
    cubin.kernel = facts.text("kernel");
    cubin.name = facts.text("name");
    cubin.capability = facts.integer("capability");
    cubin.shared_bytes = facts.integer("shared_bytes");
    cubin.threads = facts.integer("threads");
    cubin.tile_rows = facts.integer("tile_rows");
    cubin.scratch_pointers = facts.integer("scratch_pointers");
    cubin.code = code;
    return cubin;
}

}  // namespace gqa
