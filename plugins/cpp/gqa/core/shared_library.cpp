#include "gqa/core/shared_library.h"

#include <dlfcn.h>

#include <utility>

#include "gqa/core/error.h"

namespace gqa {
namespace {

std::string last_reason() {
    char const* reason = dlerror();
    return reason ? reason : "unknown reason";
}

}  // namespace

SharedLibrary::SharedLibrary(std::string const& name, std::string fix)
    : name_(name), fix_(std::move(fix)), handle_(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) throw Error("cannot load " + name_ + ": " + last_reason(), name_, fix_);
}

SharedLibrary::~SharedLibrary() { dlclose(handle_); }

void* SharedLibrary::address(char const* symbol) const {
    void* const found = dlsym(handle_, symbol);
    if (!found) throw Error(name_ + " has no " + symbol, name_, fix_);
    return found;
}

}  // namespace gqa
