// grpc.reflection.v1alpha by hand: Debian's gRPC ships the server part without the client's messages.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace grpc {
class Channel;
}

namespace tandem::integration {

// The full names of the services that the server lists; empty if it has no reflection.
std::vector<std::string> ListServices(const std::shared_ptr<grpc::Channel>& channel);

}  // namespace tandem::integration
