#pragma once

#include "vec.h"
#include "activation.h"
#include "step.h"
#include "loops.h"
#include "table.h"
