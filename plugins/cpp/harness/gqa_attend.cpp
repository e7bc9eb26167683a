// One attention layer on a GPU without TensorRT: the plugin's own launches on data from files.
//
//   gqa_attend --capability       prints the GPU's compute capability: 89 is 8.9
//   gqa_attend FOLDER [REPEATS]   runs once, or REPEATS times from a captured graph, and prints microseconds per run
//
// FOLDER holds `layer` (the creation fields, then B S C D E dtype R/2 M, in one line), `keys`, `cubins` (the serialized
// fields) and a raw file per input of the node. Written there: output, and past_key and past_value as they are after.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "gqa/attention/loaded_kernels.h"
#include "gqa/core/error.h"
#include "gqa/cuda/memory.h"

namespace {

using namespace gqa;

std::string read(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error("cannot read the file", path, "see the head of gqa_attend.cpp");
    return {std::istreambuf_iterator<char>(file), {}};
}

// Device memory with a file's bytes in it.
class Loaded {
public:
    Loaded(std::string const& bytes, cuda::Stream stream) : memory_(bytes.empty() ? 1 : bytes.size(), stream) {
        cuda::check(cuda::driver().to_device(address(), bytes.data(), bytes.size(), stream), "copying to the GPU");
        cuda::check(cuda::driver().stream_synchronize(stream), "copying to the GPU");
    }
    cuda::Address address() const { return memory_.address(); }

    void save(std::string const& path, cuda::Stream stream) const {
        std::string bytes(memory_.bytes(), '\0');
        cuda::check(cuda::driver().to_host(bytes.data(), address(), bytes.size(), stream), "copying from the GPU");
        cuda::check(cuda::driver().stream_synchronize(stream), "copying from the GPU");
        std::ofstream(path, std::ios::binary) << bytes;
    }

private:
    cuda::DeviceMemory memory_;
};

struct Call {
    Layer layer;
    Sizes sizes;
};

Call read_call(std::string const& path) {
    std::ifstream words(path);
    Call call;
    for (CreationField const& field : creation_of(1)) {
        if (field.integer) {
            words >> call.layer.*field.integer;
        } else {
            words >> call.layer.*field.real;
        }
    }
    Sizes& s = call.sizes;
    std::string dtype;
    words >> s.batch >> s.steps >> s.capacity >> s.head >> s.value_head >> dtype >> s.rotary_half >> s.max_position;
    if (!words) throw Error("the line is not complete", path, "see the head of gqa_attend.cpp");
    s.kind = kind_from(dtype);
    check_layer(call.layer);
    return call;
}

void run(std::string const& folder, int repeats, cuda::Stream stream) {
    auto const [layer, sizes] = read_call(folder + "/layer");
    CubinStore store;
    store.add(read(folder + "/cubins"));
    LoadedLayer const kernels(layer, sizes, parse_keys(read(folder + "/keys")), store);

    std::map<Input, Loaded> inputs;
    std::array<std::uint64_t, kInputCount> pointers{};
    for (Input input : node_inputs(layer)) {
        auto const placed = inputs.emplace(input, Loaded(read(folder + "/" + name_of(input)), stream));
        pointers[static_cast<std::size_t>(input)] = placed.first->second.address();
    }
    auto const bytes = static_cast<std::size_t>(sizes.batch * sizes.steps * layer.num_heads * sizes.value_head *
                                                bytes_of(sizes.kind));
    Loaded const output(std::string(bytes, '\0'), stream);
    cuda::DeviceMemory const workspace(static_cast<std::size_t>(workspace_bytes(layer, sizes)), stream);
    auto enqueue = [&, &the_layer = layer, &the_sizes = sizes] {
        kernels.enqueue(the_layer, the_sizes, pointers, output.address(), workspace.address(), stream);
    };
    auto wait = [stream] { cuda::check(cuda::driver().stream_synchronize(stream), "running the layer"); };
    enqueue();
    wait();
    if (repeats > 0) {
        cuda::CapturedGraph const graph(stream, enqueue);
        auto const start = std::chrono::steady_clock::now();
        for (int i = 0; i < repeats; ++i) graph.launch(stream);
        wait();
        std::chrono::duration<double, std::micro> const taken = std::chrono::steady_clock::now() - start;
        std::printf("%.2f\n", taken.count() / repeats);
    }
    output.save(folder + "/output", stream);
    inputs.at(Input::past_key).save(folder + "/past_key", stream);
    inputs.at(Input::past_value).save(folder + "/past_value", stream);
}

}  // namespace

int main(int count, char** words) {
    try {
        if (count < 2) throw Error("nothing to run", "command line", "gqa_attend FOLDER [REPEATS]");
        cuda::DeviceContext const device(0);
        if (std::string(words[1]) == "--capability") {
            std::printf("%d\n", device.facts().capability);
            return 0;
        }
        cuda::OwnedStream const stream;
        run(words[1], count > 2 ? std::atoi(words[2]) : 0, stream.get());
        return 0;
    } catch (std::exception const& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
