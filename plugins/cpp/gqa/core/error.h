// The one exception of the C++ side: what went wrong, where, and what to do next, as in gqa_export/errors.py.
#pragma once

#include <stdexcept>
#include <string>

namespace gqa {

class Error : public std::runtime_error {
public:
    // what: one sentence, the cause. where: file, layer or argument. fix: what the user does next.
    Error(std::string what, std::string where, std::string fix);

    std::string const& cause() const noexcept { return cause_; }
    std::string const& where() const noexcept { return where_; }
    std::string const& fix() const noexcept { return fix_; }

private:
    std::string cause_, where_, fix_;
};

}  // namespace gqa
