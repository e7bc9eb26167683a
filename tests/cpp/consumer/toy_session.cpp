// gqa_session over the toy engine, for a program in C. MANIFEST is the file's path.
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "gqa/c/handle.h"
#include "gqa/cuda/memory.h"
#include "toy_engine.h"

extern "C" gqa_session* toy_session(char const* path) {
    static gqa::cuda::DeviceContext const device(0);
    std::ifstream file(path);
    gqa::Manifest const manifest = gqa::parse_manifest({std::istreambuf_iterator<char>(file), {}}, path);
    return new gqa_session(gqa::Session(manifest, std::make_unique<ToyEngine>(manifest)));
}
