#include "gqa/runtime/json.h"

#include <algorithm>
#include <cstdlib>
#include <locale>
#include <sstream>
#include <utility>

#include "gqa/core/error.h"

namespace gqa {
namespace {

constexpr int kDeepest = 64;
constexpr char kFix[] = "the file is damaged: write it again with gqa-export";

void append_utf8(std::string& out, std::uint32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
        return;
    }
    int const more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr unsigned char kFirst[] = {0, 0xc0, 0xe0, 0xf0};
    out += static_cast<char>(kFirst[more] | code >> (6 * more));
    for (int shift = 6 * (more - 1); shift >= 0; shift -= 6) out += static_cast<char>(0x80 | (code >> shift & 0x3f));
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

class JsonParser {
public:
    JsonParser(std::string_view text, std::string const& where) : text_(text), where_(where) {}

    Json document() {
        Json value = parse_value(where_ + ": ", 0);
        skip_space();
        if (at_ != text_.size()) fail("something follows the value");
        return value;
    }

private:
    [[noreturn]] void fail(std::string const& what) const {
        auto const before = text_.substr(0, at_);
        auto const line = std::count(before.begin(), before.end(), '\n') + 1;
        auto const last = before.rfind('\n');
        auto const column = last == std::string_view::npos ? at_ + 1 : at_ - last;
        throw Error("not valid JSON: " + what,
                    where_ + ", line " + std::to_string(line) + ", column " + std::to_string(column), kFix);
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }

    bool take(char expected) {
        if (peek() != expected) return false;
        ++at_;
        return true;
    }

    void expect(char expected, char const* after) {
        if (!take(expected)) fail(std::string("expected '") + expected + "' " + after);
    }

    bool take_word(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Json parse_value(std::string path, int depth) {
        if (depth > kDeepest) fail("nested deeper than " + std::to_string(kDeepest));
        Json value;
        value.path_ = std::move(path);
        skip_space();
        if (peek() == '{') {
            value.value_ = parse_object(value.path_, depth);
        } else if (peek() == '[') {
            value.value_ = parse_array(value.path_, depth);
        } else if (peek() == '"') {
            value.value_ = parse_string();
        } else if (take_word("true")) {
            value.value_ = true;
        } else if (take_word("false")) {
            value.value_ = false;
        } else if (!take_word("null")) {
            parse_number(value);
        }
        return value;
    }

    Json::Object parse_object(std::string const& path, int depth) {
        Json::Object object;
        ++at_;
        skip_space();
        if (take('}')) return object;
        do {
            skip_space();
            if (peek() != '"') fail("expected a key in double quotes");
            std::string key = parse_string();
            if (object.count(key)) fail("key \"" + key + "\" is there twice");
            skip_space();
            expect(':', "after a key");
            bool const top = path.size() >= 2 && path.compare(path.size() - 2, 2, ": ") == 0;
            Json value = parse_value(path + (top ? "" : ".") + key, depth + 1);
            object.emplace(std::move(key), std::move(value));
            skip_space();
        } while (take(','));
        expect('}', "or ',' in an object");
        return object;
    }

    Json::Array parse_array(std::string const& path, int depth) {
        Json::Array array;
        ++at_;
        skip_space();
        if (take(']')) return array;
        do {
            array.push_back(parse_value(path + "[" + std::to_string(array.size()) + "]", depth + 1));
            skip_space();
        } while (take(','));
        expect(']', "or ',' in an array");
        return array;
    }

    std::uint32_t parse_hex4() {
        std::uint32_t code = 0;
        for (int i = 0; i < 4; ++i) {
            static constexpr std::string_view kHex = "0123456789abcdef";
            char const lower = static_cast<char>(peek() >= 'A' && peek() <= 'F' ? peek() + 32 : peek());
            auto const digit = lower == '\0' ? std::string_view::npos : kHex.find(lower);
            if (digit == std::string_view::npos) fail("\\u needs four hexadecimal digits");
            code = code * 16 + static_cast<std::uint32_t>(digit);
            ++at_;
        }
        return code;
    }

    std::uint32_t parse_escaped_code() {
        std::uint32_t const code = parse_hex4();
        if (code < 0xd800 || code > 0xdfff) return code;
        if (code > 0xdbff || !take('\\') || !take('u')) fail("half of a surrogate pair");
        std::uint32_t const low = parse_hex4();
        if (low < 0xdc00 || low > 0xdfff) fail("half of a surrogate pair");
        return 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }

    std::string parse_string() {
        std::string out;
        ++at_;
        while (!take('"')) {
            if (at_ == text_.size()) fail("a string does not end");
            char const c = text_[at_];
            if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
            ++at_;
            if (c != '\\') {
                out += c;
                continue;
            }
            static constexpr std::string_view kLetters = "\"\\/bfnrt", kMeaning = "\"\\/\b\f\n\r\t";
            char const letter = peek();
            auto const known = letter == '\0' ? std::string_view::npos : kLetters.find(letter);
            if (known == std::string_view::npos && letter != 'u') fail("an escape that JSON does not have");
            ++at_;
            if (letter == 'u') {
                append_utf8(out, parse_escaped_code());
            } else {
                out += kMeaning[known];
            }
        }
        return out;
    }

    void digits() {
        if (!is_digit(peek())) fail("expected a value");
        while (is_digit(peek())) ++at_;
    }

    void parse_number(Json& value) {
        std::size_t const start = at_;
        take('-');
        if (!take('0')) digits();
        bool whole = true;
        if (take('.')) digits(), whole = false;
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            digits(), whole = false;
        }
        std::string const text(text_.substr(start, at_ - start));
        if (whole && text.size() <= 18) {
            value.value_ = static_cast<std::int64_t>(std::strtoll(text.c_str(), nullptr, 10));
        } else {
            std::istringstream stream(text);
            stream.imbue(std::locale::classic());  // a point is a point, whatever the program's locale
            double real = 0;
            stream >> real;
            value.value_ = real;
        }
    }

    std::string_view text_;
    std::string where_;
    std::size_t at_ = 0;
};

Json Json::parse(std::string_view text, std::string const& where) { return JsonParser(text, where).document(); }

void Json::refuse(std::string const& expected) const { throw Error("expected " + expected, path_, kFix); }

bool Json::has(std::string_view key) const {
    auto const* const object = std::get_if<Object>(&value_);
    return object && object->find(key) != object->end();
}

Json const& Json::at(std::string_view key) const {
    auto const found = object().find(key);
    if (found == object().end()) refuse("a key \"" + std::string(key) + "\"");
    return found->second;
}

Json const& Json::item(std::size_t index) const {
    if (index >= array().size()) refuse("an item " + std::to_string(index));
    return array()[index];
}

bool Json::boolean() const {
    if (auto const* const value = std::get_if<bool>(&value_)) return *value;
    refuse("true or false");
}

std::int64_t Json::integer() const {
    if (auto const* const value = std::get_if<std::int64_t>(&value_)) return *value;
    refuse("a whole number");
}

double Json::real() const {
    if (auto const* const value = std::get_if<double>(&value_)) return *value;
    return static_cast<double>(integer());
}

std::string const& Json::string() const {
    if (auto const* const value = std::get_if<std::string>(&value_)) return *value;
    refuse("a string");
}

Json::Array const& Json::array() const {
    if (auto const* const value = std::get_if<Array>(&value_)) return *value;
    refuse("an array");
}

Json::Object const& Json::object() const {
    if (auto const* const value = std::get_if<Object>(&value_)) return *value;
    refuse("an object");
}

}  // namespace gqa
