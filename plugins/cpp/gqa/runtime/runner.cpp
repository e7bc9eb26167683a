#include "gqa/runtime/runner.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "gqa/core/error.h"

namespace gqa {
namespace {

constexpr char kIds[] = "input_ids", kPastLengths[] = "past_lengths", kNewLengths[] = "new_lengths",
               kLogits[] = "logits", kHiddenStates[] = "hidden_states";

TensorFact const& find(std::vector<TensorFact> const& tensors, std::string const& name) {
    for (TensorFact const& tensor : tensors) {
        if (tensor.name == name) return tensor;
    }
    throw Error("the engine has no tensor '" + name + "'", "gqa_export.json",
                "build the engine from a trt-plugin or trt-native bundle with `gqa-export trt`");
}

bool is_cache(std::string const& name) { return name != kIds && name != kPastLengths && name != kNewLengths; }

std::size_t elements_of_row(TensorFact const& tensor) {
    std::size_t count = 1;
    for (std::int64_t axis : tensor.row) count *= static_cast<std::size_t>(axis);
    return count;
}

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

}  // namespace

Runner::Runner(Manifest const& manifest, std::unique_ptr<Engine> engine, bool cuda_graph, Log log,
               std::shared_ptr<Communicator> communicator)
    : manifest_(manifest),
      log_(std::move(log)),
      cuda_graph_(cuda_graph && !communicator),  // the ranks' steps are not captured
      ids_number_(find(manifest.inputs, kIds).number),
      logits_number_(find(manifest.outputs, kLogits).number),
      communicator_(std::move(communicator)),
      engine_(std::move(engine)),
      ids_(size(manifest.max_batch * manifest.max_prompt) * bytes_of(ids_number_)),
      past_lengths_(size(manifest.max_batch) * sizeof(std::int32_t)),
      new_lengths_(size(manifest.max_batch) * sizeof(std::int32_t)),
      logits_(size(manifest.max_batch * manifest.vocabulary) * bytes_of(logits_number_)) {
    auto allocate = [this](std::string const& name, std::size_t bytes) {
        memory_.emplace(name, cuda::DeviceMemory(bytes, stream_.get()));
    };
    std::size_t const rows = size(manifest.max_batch);
    allocate(kIds, rows * size(manifest.max_prompt) * bytes_of(ids_number_));
    allocate(kPastLengths, rows * sizeof(std::int32_t));
    allocate(kNewLengths, rows * sizeof(std::int32_t));
    allocate(kLogits, rows * size(manifest.vocabulary) * bytes_of(logits_number_));
    for (TensorFact const& tensor : manifest.outputs) {  // for drafting heads; TensorRT wants memory for it
        if (tensor.name != kHiddenStates) continue;
        allocate(kHiddenStates, rows * size(manifest.max_prompt) * size(tensor.row.at(1)) * bytes_of(tensor.number));
    }
    for (TensorFact const& tensor : manifest.inputs) {
        if (is_cache(tensor.name)) allocate(tensor.name, rows * elements_of_row(tensor) * bytes_of(tensor.number));
    }
    decode_ = open(manifest.decode_profile);
    prefill_ = open(manifest.prefill_profile);
    stream_.wait();
    if (communicator_) join();
}

Runner::~Runner() {
    if (!communicator_) return;
    // After a failure: the memory is not given back under a run that NCCL is about to abandon.
    auto const ends = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (cuda::driver().stream_query(stream_.get()) == cuda::kNotReady && std::chrono::steady_clock::now() < ends) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void Runner::join() {
    void* const communicator = communicator_->get();
    communicator_->call([engine = engine_, decode = decode_.context, prefill = prefill_.context, communicator] {
        decode->join(communicator);
        prefill->join(communicator);
    }, "setting the communicator");
}

void Runner::wait() {
    if (communicator_) communicator_->wait([this] { return stream_.done(); }, "running the engine");
    stream_.wait();
}

Runner::Profile Runner::open(int index) {
    Profile profile{engine_->context(index, stream_.get())};
    for (auto const& [name, memory] : memory_) profile.context->bind(name, memory.address());
    for (auto const& [present, past] : manifest_.aliases) profile.context->bind(present, memory_.at(past).address());
    return profile;
}

void Runner::zero_cache() {
    for (auto const& [name, memory] : memory_) {
        if (!is_cache(name) || name == kLogits || name == kHiddenStates) continue;
        cuda::check(cuda::driver().fill(memory.address(), 0, memory.bytes(), stream_.get()), "zeroing the cache");
    }
}

template <typename Work>
void Runner::each_cache(std::int64_t row, Work work) const {
    for (TensorFact const& tensor : manifest_.inputs) {
        if (!is_cache(tensor.name)) continue;
        std::size_t const row_bytes = elements_of_row(tensor) * bytes_of(tensor.number);
        std::size_t const heads = size(tensor.row[0]), head_bytes = row_bytes / heads;
        work(memory_.at(tensor.name).address() + size(row) * row_bytes, heads, head_bytes,
             head_bytes / size(tensor.row[1]));
    }
}

void Runner::copy_row(std::int64_t from, std::int64_t to, std::int64_t tokens) {
    each_cache(0, [&](cuda::Address first, std::size_t heads, std::size_t head, std::size_t token) {
        for (std::size_t i = 0; i < heads; ++i) {
            cuda::check(cuda::driver().on_device(first + (size(to) * heads + i) * head,
                                                 first + (size(from) * heads + i) * head,
                                                 std::min(size(tokens) * token, head), stream_.get()),
                        "copying a row of the cache");
        }
    });
    stream_.wait();
}

void Runner::zero_row(std::int64_t row, std::int64_t begin) {
    each_cache(row, [&](cuda::Address first, std::size_t heads, std::size_t head, std::size_t token) {
        std::size_t const kept = size(begin) * token;
        for (std::size_t i = 0; i < heads && kept < head; ++i) {
            cuda::check(cuda::driver().fill(first + i * head + kept, 0, head - kept, stream_.get()),
                        "zeroing a row of the cache");
        }
    });
    stream_.wait();
}

void Runner::set_shapes(Profile& profile, Feed const& feed) {
    for (TensorFact const& tensor : manifest_.inputs) {
        Shape shape{feed.batch};
        if (tensor.name == kIds) {
            shape.push_back(feed.steps);
        } else {
            shape.insert(shape.end(), tensor.row.begin(), tensor.row.end());
        }
        profile.context->set_shape(tensor.name, shape);
    }
    profile.batch = feed.batch;
    profile.steps = feed.steps;
}

void Runner::fill_host(Feed const& feed) {
    if (ids_number_ == Number::int64) {
        std::copy(feed.ids.begin(), feed.ids.end(), ids_.as<std::int64_t>());
    } else {
        std::copy(feed.ids.begin(), feed.ids.end(), ids_.as<std::int32_t>());
    }
    std::copy(feed.past_lengths.begin(), feed.past_lengths.end(), past_lengths_.as<std::int32_t>());
    std::copy(feed.new_lengths.begin(), feed.new_lengths.end(), new_lengths_.as<std::int32_t>());
}

void Runner::enqueue(Profile& profile, std::int64_t batch, std::int64_t steps) {
    auto const& driver = cuda::driver();
    auto upload = [&](char const* name, cuda::PinnedMemory const& host, std::size_t bytes) {
        cuda::check(driver.to_device(memory_.at(name).address(), host.as<void>(), bytes, stream_.get()),
                    "copying tokens to the GPU");
    };
    upload(kIds, ids_, size(batch * steps) * bytes_of(ids_number_));
    upload(kPastLengths, past_lengths_, size(batch) * sizeof(std::int32_t));
    upload(kNewLengths, new_lengths_, size(batch) * sizeof(std::int32_t));
    profile.context->enqueue(stream_.get());
    cuda::check(driver.to_host(logits_.as<void>(), memory_.at(kLogits).address(),
                               size(batch * manifest_.vocabulary) * bytes_of(logits_number_), stream_.get()),
                "copying logits from the GPU");
}

void Runner::run_captured(std::int64_t batch) {
    if (!graph_) {
        try {
            graph_.emplace(stream_.get(), [&] { enqueue(decode_, batch, 1); });
        } catch (Error const& error) {
            cuda_graph_ = false;
            log_("decode steps run without a CUDA graph: " + std::string(error.what()));
            enqueue(decode_, batch, 1);
            return;
        }
    }
    graph_->launch(stream_.get());
}

void const* Runner::run(Feed const& feed) {
    if (communicator_) communicator_->get();  // refuses where this rank has left the others
    fill_host(feed);
    Profile& profile = feed.steps == 1 ? decode_ : prefill_;
    bool const ran_like_this = profile.batch == feed.batch && profile.steps == feed.steps;
    if (!ran_like_this) {
        if (&profile == &decode_) graph_.reset();  // it was captured for other shapes
        set_shapes(profile, feed);
    }
    // The first run of a shape is never captured: TensorRT still allocates then, and the plugin loads its kernels.
    if (&profile == &decode_ && ran_like_this && cuda_graph_) {
        run_captured(feed.batch);
    } else {
        enqueue(profile, feed.batch, feed.steps);
    }
    wait();
    return logits_.as<void>();
}

}  // namespace gqa
