// Drives libgqa_plugin.so as TensorRT does, by the lines of standard input; prints what it answers and what it logs.
//
//   probe_plugin LIBRARY
//   field NAME KIND HEX          one more field for the next `create`; KIND int32 | int64 | float32 | char
//   create build|runtime [NAME]  -> made | refused
//   keep; swap N                 put the plugin aside, as number 0, 1, ...; exchange it with number N
//   context ID                   another CUDA context from here on, at the same address
//   previous                     the plugin made before the last one is the one asked from here on
//   creator                      -> the creator's identity and fields
//   outputs                      -> their number and, for each, the input whose memory it is
//   formats                      -> for every position, the types it takes beside an fp16 query
//   configure TYPE DIMS          -> the result and the workspace's bytes; DIMS: 1,1,128;1,2,64,32;... of every input
//   serialize                    -> "NAME KIND HEX", a line per field
//   run TYPE DIMS [apart|again]  -> onShapeChange's and enqueue's results; apart: presents in other memory than pasts;
//                                again: on the clone that the last run made
#include <NvInferRuntime.h>

#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gqa/core/shared_library.h"
#include "gqa/cuda/driver.h"

using namespace nvinfer1;

namespace {

class PrintingLogger final : public ILogger {
public:
    void log(Severity, char const* message) noexcept override {
        for (char const* c = message; *c; ++c) std::cout << (*c == '\n' ? '|' : *c);
        std::cout << std::endl;
    }
};

class Finder final : public ILoggerFinder {
public:
    ILogger* findLogger() override { return &logger_; }

private:
    PrintingLogger logger_;
};

struct HeldField {
    std::string name, data;
    PluginFieldType type;
};

std::vector<std::string> split(std::string const& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

PluginFieldType field_type(std::string const& kind) {
    return kind == "int32"     ? PluginFieldType::kINT32
           : kind == "int64"   ? PluginFieldType::kINT64
           : kind == "float32" ? PluginFieldType::kFLOAT32
                               : PluginFieldType::kCHAR;
}

char const* kind_of(PluginFieldType type) {
    return type == PluginFieldType::kINT32 ? "int32" : type == PluginFieldType::kFLOAT32 ? "float32" : "char";
}

std::size_t width(PluginFieldType type) {
    return type == PluginFieldType::kCHAR ? 1 : type == PluginFieldType::kINT64 ? 8 : 4;
}

DataType data_type(std::string const& name) {
    return name == "fp16" ? DataType::kHALF : name == "bf16" ? DataType::kBF16 : DataType::kFLOAT;
}

std::string from_hex(std::string const& hex) {
    std::string data;
    for (std::size_t i = 0; i + 1 < hex.size(); i += 2) data += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    return data;
}

std::string to_hex(void const* data, std::size_t bytes) {
    std::string hex;
    for (std::size_t i = 0; i < bytes; ++i) {
        auto const byte = static_cast<unsigned char const*>(data)[i];
        hex += "0123456789abcdef"[byte >> 4];
        hex += "0123456789abcdef"[byte & 15];
    }
    return hex;
}

std::vector<Dims> read_dims(std::string const& text) {
    std::vector<Dims> all;
    for (std::string const& shape : split(text, ';')) {
        Dims dims{};
        for (std::string const& axis : split(shape, ',')) dims.d[dims.nbDims++] = std::stoll(axis);
        all.push_back(dims);
    }
    return all;
}

// The lengths follow past_value, which is the last of the tensors with four axes. Of version 2, the tables are the last
// three inputs: two of whole numbers around one of fp32.
bool holds_lengths(std::vector<Dims> const& dims, std::size_t index) { return dims[index].nbDims == 1 && index < 7; }

class Driven {
public:
    explicit Driven(IPluginCreatorV3One& creator) : creator_(creator) {}

    void obey(std::istringstream& words) {
        std::string command, first, second, third;
        words >> command >> first >> second >> third;
        if (command == "field") held_.push_back({first, from_hex(third), field_type(second)});
        if (command == "create") create(first, second);
        if (command == "previous") plugin_.swap(before_);
        if (command == "keep") kept_.push_back(std::move(plugin_));
        if (command == "swap") plugin_.swap(kept_.at(std::stoul(first)));
        if (command == "creator") print_creator();
        if (command == "outputs") print_outputs();
        if (command == "formats") print_formats();
        if (command == "types") print_types();
        if (command == "configure") configure(data_type(first), read_dims(second));
        if (command == "serialize") serialize();
        if (command == "context") setenv("GQA_STUB_CONTEXT_ID", first.c_str(), 1);  // another, at the same address
        if (command == "run") run(data_type(first), read_dims(second), third);
    }

private:
    void create(std::string const& phase, std::string const& name) {
        std::vector<PluginField> fields;
        for (auto const& held : held_) {
            fields.emplace_back(held.name.c_str(), held.data.data(), held.type,
                                static_cast<int32_t>(held.data.size() / width(held.type)));
        }
        PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
        before_ = std::move(plugin_);
        plugin_.reset(creator_.createPlugin(name.c_str(), &collection,
                                            phase == "build" ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME));
        held_.clear();
        std::cout << (plugin_ ? "made" : "refused") << std::endl;
    }

    void print_creator() {
        std::cout << creator_.getPluginName() << " " << creator_.getPluginVersion() << " "
                  << creator_.getPluginNamespace();
        auto const* const names = creator_.getFieldNames();
        for (int i = 0; i < names->nbFields; ++i) {
            std::cout << " " << names->fields[i].name << ":" << kind_of(names->fields[i].type);
        }
        std::cout << std::endl;
    }

    IPluginV3OneBuildV2& build() {
        return *static_cast<IPluginV3OneBuildV2*>(plugin_->getCapabilityInterface(PluginCapabilityType::kBUILD));
    }

    void print_outputs() {
        std::cout << build().getNbOutputs();
        for (int32_t i = 0; i < build().getNbOutputs(); ++i) std::cout << " " << build().getAliasedInput(i);
        std::cout << std::endl;
    }

    void print_types() {
        std::vector<DataType> inputs(7, DataType::kHALF), outputs(3);
        build().getOutputDataTypes(outputs.data(), build().getNbOutputs(), inputs.data(), 7);
        for (int32_t i = 0; i < build().getNbOutputs(); ++i) {
            DataType const type = outputs[static_cast<std::size_t>(i)];
            std::cout << (i ? " " : "")
                      << (type == DataType::kINT8 ? "int8" : type == DataType::kFP8 ? "fp8" : "query's");
        }
        std::cout << std::endl;
    }

    void print_formats() {
        static constexpr DataType kTypes[] = {DataType::kHALF, DataType::kBF16, DataType::kFLOAT, DataType::kINT32,
                                              DataType::kINT8, DataType::kFP8};
        std::vector<DynamicPluginTensorDesc> all(16);
        for (auto& one : all) one.desc.type = DataType::kHALF, one.desc.format = TensorFormat::kLINEAR;
        for (int32_t position = 0; position < 7 + build().getNbOutputs(); ++position) {
            for (DataType type : kTypes) {
                auto& desc = all[static_cast<std::size_t>(position)].desc;
                desc.type = type;
                std::cout << build().supportsFormatCombination(position, all.data(), 7, build().getNbOutputs());
                desc.type = DataType::kHALF;
            }
            std::cout << " ";
        }
        all[0].desc.format = TensorFormat::kHWC8;
        std::cout << build().supportsFormatCombination(0, all.data(), 7, build().getNbOutputs()) << std::endl;
    }

    void configure(DataType type, std::vector<Dims> const& dims) {
        std::vector<DynamicPluginTensorDesc> inputs(dims.size()), outputs(3);
        for (std::size_t i = 0; i < dims.size(); ++i) {
            inputs[i].desc.type = holds_lengths(dims, i) ? DataType::kINT32 : type;
            inputs[i].desc.dims = inputs[i].min = inputs[i].opt = inputs[i].max = dims[i];
        }
        auto const count = static_cast<int32_t>(dims.size());
        int32_t const result = build().configurePlugin(inputs.data(), count, outputs.data(), build().getNbOutputs());
        std::cout << result << " "
                  << build().getWorkspaceSize(inputs.data(), count, outputs.data(), build().getNbOutputs())
                  << std::endl;
    }

    IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
        return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    }

    void serialize() {
        auto const* const made = runtime(*plugin_).getFieldsToSerialize();
        for (int i = 0; i < made->nbFields; ++i) {
            auto const& field = made->fields[i];
            std::cout << field.name << " " << kind_of(field.type) << " "
                      << to_hex(field.data, static_cast<std::size_t>(field.length) * width(field.type)) << std::endl;
        }
        std::cout << "--" << std::endl;
    }

    void run(DataType type, std::vector<Dims> const& dims, std::string const& how) {
        bool const apart = how == "apart";
        std::vector<PluginTensorDesc> inputs(dims.size()), outputs(3);
        std::vector<void const*> addresses;
        for (std::size_t i = 0; i < dims.size(); ++i) {
            inputs[i].dims = dims[i];
            inputs[i].type = holds_lengths(dims, i) ? DataType::kINT32 : type;
            addresses.push_back(reinterpret_cast<void const*>(std::uintptr_t{4096} * (i + 1)));
        }
        if (how != "again") attached_.reset(runtime(*plugin_).attachToContext(nullptr));
        int32_t const count = build().getNbOutputs();
        std::vector<void*> results{reinterpret_cast<void*>(std::uintptr_t{1} << 20)};
        for (int32_t i = 1; i < count; ++i) {
            auto const aliased = static_cast<std::size_t>(build().getAliasedInput(i));
            results.push_back(const_cast<void*>(addresses[apart ? 0 : aliased]));
        }
        auto& running = runtime(*attached_);
        int32_t const shaped =
            running.onShapeChange(inputs.data(), static_cast<int32_t>(dims.size()), outputs.data(), count);
        int32_t const done = running.enqueue(inputs.data(), outputs.data(), addresses.data(), results.data(),
                                             reinterpret_cast<void*>(std::uintptr_t{1} << 24), nullptr);
        std::cout << shaped << " " << done << std::endl;
    }

    IPluginCreatorV3One& creator_;
    std::vector<HeldField> held_;
    std::unique_ptr<IPluginV3> plugin_, before_, attached_;
    std::vector<std::unique_ptr<IPluginV3>> kept_;
};

}  // namespace

int main(int, char** words) {
    gqa::SharedLibrary const library(words[1], "build it");
    Finder finder;
    library.function<void(ILoggerFinder*)>("setLoggerFinder")(&finder);
    int32_t count = 0;
    auto const* const creators =
        library.function<IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    if (count != 3) return 1;
    std::size_t const version = words[2] ? std::stoul(words[2]) : 1;
    gqa::cuda::Context context = nullptr;
    gqa::cuda::driver().primary_context_retain(&context, 0);
    gqa::cuda::driver().context_set_current(context);
    Driven driven(*static_cast<IPluginCreatorV3One*>(creators[version - 1]));
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words_of_line(line);
        driven.obey(words_of_line);
    }
    return 0;
}
