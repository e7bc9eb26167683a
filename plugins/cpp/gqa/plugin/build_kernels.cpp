#include "gqa/plugin/build_kernels.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <tuple>

#include "gqa/attention/launch.h"
#include "gqa/attention/long_launch.h"
#include "gqa/core/error.h"
#include "gqa/core/sha256.h"

namespace gqa::plugin {
namespace {

constexpr char kCompile[] = "compile them: python -m gqa_plugins.grouped_attention.cubin --help";

std::string read_file(std::filesystem::path const& path) {
    std::ifstream file(path, std::ios::binary);
    std::string data{std::istreambuf_iterator<char>(file), {}};
    if (!file) throw Error("cannot read the kernel", path.string(), kCompile);
    return data;
}

// Everything that tells whether a folder's files are still the same.
std::string state_of(std::string const& folder) {
    namespace fs = std::filesystem;
    std::set<std::string> files;
    if (fs::is_directory(folder)) {
        for (fs::directory_entry const& entry : fs::directory_iterator(folder)) {
            if (entry.path().extension() != ".gqacubin") continue;
            files.insert(entry.path().string() + " " + std::to_string(entry.file_size()) + " " +
                         std::to_string(entry.last_write_time().time_since_epoch().count()));
        }
    }
    std::string state = folder;
    for (std::string const& file : files) state += "\n" + file;
    return state;
}

bool belongs_to(Cubin const& cubin, Layer const& layer, Sizes const& sizes) {
    try {
        check_cubin(cubin, layer, sizes);
        return true;
    } catch (Error const&) {
        return false;
    }
}

}  // namespace

BuildKernels::BuildKernels(std::string const& folder) : folder_(folder) {
    namespace fs = std::filesystem;
    if (!fs::is_directory(folder)) throw Error("GQA_KERNELS names no folder", folder, kCompile);
    std::map<std::string, std::string> files;
    for (fs::directory_entry const& entry : fs::directory_iterator(folder)) {
        if (entry.path().extension() != ".gqacubin") continue;
        std::string data = read_file(entry.path());
        std::string const sha256 = sha256_hex(data);
        cubins_[sha256] = parse_cubin(data, entry.path().string());
        files[sha256] = std::move(data);
    }
    std::string header = "gqa-cubins 1\n", bodies;
    for (auto const& [sha256, data] : files) {
        header += sha256 + " " + std::to_string(data.size()) + "\n";
        bodies += data;
    }
    container_ = header + "\n" + bodies;
}

std::vector<Key> BuildKernels::keys_of(Layer const& layer, Sizes const& sizes) const {
    std::vector<std::string> wanted{"combine", "decode", "prefill"};
    if (layer.appends()) wanted.insert(wanted.begin(), "append");
    if (layer.method) wanted.insert(wanted.end(), kLongKernels.begin(), kLongKernels.end());
    std::vector<Key> keys;
    std::set<std::string> found;
    for (auto const& [sha256, cubin] : cubins_) {
        bool const asked = std::find(wanted.begin(), wanted.end(), cubin.kernel) != wanted.end();
        if (!asked || !belongs_to(cubin, layer, sizes)) continue;
        keys.push_back({cubin.kernel, cubin.capability, sha256});
        found.insert(cubin.kernel);
    }
    for (std::string const& kernel : wanted) {
        if (found.count(kernel)) continue;
        throw Error("the folder has no " + kernel + " kernel for " + std::to_string(layer.num_heads) + " heads, " +
                        std::to_string(layer.kv_num_heads) + " key/value heads, head size " +
                        std::to_string(sizes.head) + ", " + name_of(sizes.kind), folder_, kCompile);
    }
    std::sort(keys.begin(), keys.end(), [](Key const& a, Key const& b) {
        return std::tie(a.kernel, a.capability, a.sha256) < std::tie(b.kernel, b.capability, b.sha256);
    });
    return keys;
}

std::shared_ptr<BuildKernels const> BuildKernels::from_environment() {
    static auto* const lock = new std::mutex;
    static auto* const read = new std::pair<std::string, std::shared_ptr<BuildKernels const>>;
    char const* const folder = std::getenv("GQA_KERNELS");
    if (!folder) return nullptr;
    std::lock_guard const guard(*lock);
    std::string const state = state_of(folder);
    if (!read->second || read->first != state) {
        auto kernels = std::make_shared<BuildKernels const>(folder);
        CubinStore::of_process().add(kernels->container());
        *read = {state, std::move(kernels)};
    }
    return read->second;
}

void Carriers::configure() {
    std::lock_guard const guard(lock_);
    ++configured_;
}

bool Carriers::choose() {
    std::lock_guard const guard(lock_);
    auto const [found, fresh] = carried_.try_emplace(std::this_thread::get_id(), configured_);
    if (!fresh && found->second == configured_) return false;
    found->second = configured_;
    return true;
}

}  // namespace gqa::plugin
