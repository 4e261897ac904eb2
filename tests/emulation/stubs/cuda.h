// What the kernels' headers take from the driver's.
#pragma once

struct CUtensorMap {
  char opaque[128];
};
