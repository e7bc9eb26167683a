// TensorRT or TensorRT-RTX behind the seam of engine.h, loaded at run time. Which of the two: by the headers that
// tensorrt.cpp was compiled with, for their virtual tables differ.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "gqa/runtime/engine.h"
#include "gqa/runtime/manifest.h"

namespace gqa {

class TensorRt {
public:
    using Log = std::function<void(std::string const&)>;
    explicit TensorRt(Log log);  // loads the library; throws Error where it is not installed

    std::string flavor() const;   // "tensorrt" or "rtx"
    std::string version() const;  // of the library that was loaded: "11.1.0"

    // Makes the plugin known (if the engine has one) and the engine ready. Throws Error with TensorRT's own words.
    std::unique_ptr<Engine> load(Manifest const& manifest, std::string const& folder,
                                 std::string const& plugin_library) const;

    struct Library;  // inside tensorrt.cpp

private:
    std::shared_ptr<Library> library_;
};

}  // namespace gqa
