// JSON (RFC 8259), read strictly: what is not JSON, nests deeper than 64, or names a key twice is refused with its place.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace gqa {

class Json {
public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json, std::less<>>;

    // Throws Error "not valid JSON: ..." with line and column.
    static Json parse(std::string_view text, std::string const& where);

    bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
    bool has(std::string_view key) const;  // an object with this key

    // Each throws Error, naming the path, for a value of another kind or a key that is not there.
    Json const& at(std::string_view key) const;
    Json const& item(std::size_t index) const;
    bool boolean() const;
    std::int64_t integer() const;
    double real() const;
    std::string const& string() const;
    Array const& array() const;
    Object const& object() const;

private:
    friend class JsonParser;
    [[noreturn]] void refuse(std::string const& expected) const;

    std::variant<std::monostate, bool, std::int64_t, double, std::string, Array, Object> value_;
    std::string path_;  // "gqa_export.json: profiles[0].max"
};

}  // namespace gqa
