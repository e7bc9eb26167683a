// Lines, words and numbers of the small text headers that our binary files begin with. Nothing here allocates.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

namespace gqa {

// What comes before and after the first `separator`; the second is empty where there is none.
inline std::pair<std::string_view, std::string_view> cut(std::string_view text, std::string_view separator) {
    std::size_t const at = text.find(separator);
    if (at == std::string_view::npos) return {text, {}};
    return {text.substr(0, at), text.substr(at + separator.size())};
}

// Takes the first line off `text`.
inline std::string_view next_line(std::string_view& text) {
    auto const [line, rest] = cut(text, "\n");
    text = rest;
    return line;
}

// A decimal number of digits alone; nothing for anything else, or for one beyond 18 digits.
inline std::optional<std::int64_t> number(std::string_view digits) {
    if (digits.empty() || digits.size() > 18) return std::nullopt;
    std::int64_t value = 0;
    for (char digit : digits) {
        if (digit < '0' || digit > '9') return std::nullopt;
        value = value * 10 + (digit - '0');
    }
    return value;
}

inline bool is_sha256(std::string_view text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace gqa
