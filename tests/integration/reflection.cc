#include "tests/integration/reflection.h"

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <chrono>

namespace tandem::integration {
namespace {

using google::protobuf::io::CodedInputStream;

constexpr char kMethod[] = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
constexpr uint32_t kListServicesResponse =
    6;  // of ServerReflectionResponse; service = 1 in it, name = 1 in that

// All values of the length-delimited field `number` of a message.
std::vector<std::string> Fields(const std::string& message, uint32_t number) {
  std::vector<std::string> out;
  CodedInputStream in(reinterpret_cast<const uint8_t*>(message.data()), static_cast<int>(message.size()));
  for (uint32_t tag = in.ReadTag(); tag != 0; tag = in.ReadTag()) {
    uint32_t size = 0;
    uint64_t ignored = 0;
    std::string value;
    switch (tag & 7) {
      case 0:
        if (!in.ReadVarint64(&ignored)) return out;
        break;
      case 2:
        if (!in.ReadVarint32(&size) || !in.ReadString(&value, static_cast<int>(size))) return out;
        if (tag >> 3 == number) out.push_back(value);
        break;
      default:
        return out;  // the messages in question have no others
    }
  }
  return out;
}

}  // namespace

std::vector<std::string> ListServices(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  grpc::CompletionQueue queue;
  const auto step = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  grpc::GenericStub stub(channel);
  const auto call = stub.PrepareCall(&context, kMethod, &queue);
  call->StartCall(nullptr);
  if (!step()) return {};
  const std::string list_services("\x3a\x00", 2);  // field 7, an empty string
  const grpc::Slice slice(list_services);
  grpc::ByteBuffer answer;
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  if (!step()) return {};
  call->Read(&answer, nullptr);
  std::vector<std::string> names;
  std::vector<grpc::Slice> slices;
  if (step() && answer.Dump(&slices).ok()) {
    std::string bytes;
    for (const grpc::Slice& s : slices) bytes.append(reinterpret_cast<const char*>(s.begin()), s.size());
    for (const std::string& list : Fields(bytes, kListServicesResponse)) {
      for (const std::string& service : Fields(list, 1)) {
        for (std::string& name : Fields(service, 1)) names.push_back(std::move(name));
      }
    }
  }
  call->WritesDone(nullptr);
  step();
  grpc::Status status;
  call->Finish(&status, nullptr);
  step();
  queue.Shutdown();
  return names;
}

}  // namespace tandem::integration
