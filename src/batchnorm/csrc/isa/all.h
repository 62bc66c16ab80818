#pragma once

#include "vec.h"
#include "activation.h"
#include "lanes.h"
#include "sums.h"
#include "step.h"
#include "loops.h"
#include "channels.h"
#include "table.h"
