#include "gqa/runtime/nccl.h"

#include "gqa/core/error.h"
#include "gqa/core/shared_library.h"

namespace gqa::nccl {
namespace {

constexpr char kLibrary[] = "libnccl.so.2";

class Loaded {
public:
    Loaded() : library_(kLibrary, "install NCCL and have its lib folder on LD_LIBRARY_PATH (pip: nvidia-nccl-cu13)") {
#define GQA_NCCL_LOAD(name, symbol, result, parameters) \
    functions_.name = library_.function<result parameters>(symbol);
        GQA_NCCL_FUNCTIONS(GQA_NCCL_LOAD)
#undef GQA_NCCL_LOAD
    }
    Functions const& functions() const { return functions_; }

private:
    SharedLibrary library_;
    Functions functions_{};
};

}  // namespace

Functions const& functions() {
    static Loaded const* const loaded = new Loaded;  // never unloaded: communicators may outlive every static object
    return loaded->functions();
}

void check(Result result, std::string const& doing) {
    if (result == kSuccess || result == kInProgress) return;
    throw Error(doing + " failed: " + functions().error_string(result), "NCCL",
                "rerun with NCCL_DEBUG=WARN, which says more; start all ranks again");
}

}  // namespace gqa::nccl
