include "drivers.pxi"
