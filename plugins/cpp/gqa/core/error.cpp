#include "gqa/core/error.h"

#include <utility>

namespace gqa {
namespace {

std::string text(std::string const& what, std::string const& where, std::string const& fix) {
    std::string lines = what;
    if (!where.empty()) lines += "\n  at:  " + where;
    if (!fix.empty()) lines += "\n  fix: " + fix;
    return lines;
}

}  // namespace

Error::Error(std::string what, std::string where, std::string fix)
    : std::runtime_error(text(what, where, fix)),
      cause_(std::move(what)),
      where_(std::move(where)),
      fix_(std::move(fix)) {}

}  // namespace gqa
