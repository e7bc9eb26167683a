// A library loaded at run time, so that nothing here needs it to link, or on a machine that lacks it, to load.
#pragma once

#include <string>

namespace gqa {

class SharedLibrary {
public:
    // `fix` is what to tell the user when the library, or a symbol of it, is not there: it becomes the Error's fix.
    SharedLibrary(std::string const& name, std::string fix);
    ~SharedLibrary();
    SharedLibrary(SharedLibrary const&) = delete;
    SharedLibrary& operator=(SharedLibrary const&) = delete;

    template <typename Function>
    Function* function(char const* symbol) const {
        return reinterpret_cast<Function*>(address(symbol));
    }

private:
    void* address(char const* symbol) const;

    std::string name_, fix_;
    void* handle_ = nullptr;
};

}  // namespace gqa
