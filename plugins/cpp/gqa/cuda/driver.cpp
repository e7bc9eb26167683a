#include "gqa/cuda/driver.h"

#include <string>

#include "gqa/core/error.h"
#include "gqa/core/shared_library.h"

namespace gqa::cuda {
namespace {

constexpr char kLibrary[] = "libcuda.so.1";

class LoadedDriver {
public:
    LoadedDriver() : library_(kLibrary, "install NVIDIA's driver: this machine has no GPU, or no driver for it") {
#define GQA_CUDA_LOAD(name, symbol, parameters) functions_.name = library_.function<Result parameters>(symbol);
        GQA_CUDA_FUNCTIONS(GQA_CUDA_LOAD)
#undef GQA_CUDA_LOAD
        Result const result = functions_.init(0);
        if (result != kSuccess) {
            throw Error("the CUDA driver does not start (error " + std::to_string(result) + ")", kLibrary,
                        "check `nvidia-smi`: is there a GPU, and is its driver loaded?");
        }
    }
    Driver const& functions() const { return functions_; }

private:
    SharedLibrary library_;
    Driver functions_{};
};

std::string describe(Result result) {
    char const *name = nullptr, *text = nullptr;
    driver().get_error_name(result, &name);
    driver().get_error_string(result, &text);
    return (name ? std::string(name) : "error " + std::to_string(result)) + (text ? ": " + std::string(text) : "");
}

}  // namespace

Driver const& driver() {
    // Never unloaded: kernels and memory may outlive every other static object.
    static LoadedDriver const* const loaded = new LoadedDriver;
    return loaded->functions();
}

void check(Result result, char const* doing) {
    if (result == kSuccess) return;
    bool const memory = result == 2;  // CUDA_ERROR_OUT_OF_MEMORY
    throw Error(std::string(doing) + " failed: " + describe(result), "CUDA driver",
                memory ? "free GPU memory, or use a smaller batch or capacity"
                       : "check the GPU with `nvidia-smi`; an earlier failure on the same GPU shows up here too");
}

DeviceFacts device_facts(Device device) {
    auto attribute = [device](int which) {
        int value = 0;
        check(driver().device_get_attribute(&value, which, device), "asking the GPU for its facts");
        return value;
    };
    return {attribute(kMultiprocessorCount), attribute(kCapabilityMajor) * 10 + attribute(kCapabilityMinor)};
}

}  // namespace gqa::cuda
