// Where a column of a row lies among the row's groups. Included inside target regions, and therefore with internal
// linkage.
#pragma once

#include <algorithm>
#include <cstdint>

namespace squish::cpu {

struct GroupCursor {
  int64_t column, columns, group, groups, group_size;
  int64_t left;      // columns of the group from this one on
  float per_column;  // 1 / group_size
};

static inline GroupCursor cursor_at(int64_t column, int64_t columns, int64_t group_size) {
  const int64_t group = column / group_size;
  return {.column = column,
          .columns = columns,
          .group = group,
          .groups = columns / group_size,
          .group_size = group_size,
          .left = (group + 1) * group_size - column,
          .per_column = 1.0f / static_cast<float>(group_size)};
}

static inline void advance(GroupCursor& cursor, int64_t columns) {
  cursor.column += columns;
  cursor.left -= columns;
  if (cursor.left > 0) return;
  const bool to_next = cursor.left + cursor.group_size > 0;  // as it is for all but small groups: no division
  const int64_t groups = to_next ? 1 : 1 - cursor.left / cursor.group_size;
  cursor.group += groups;
  cursor.left += groups * cursor.group_size;
}

// Groups that the next `count` columns touch, of those the row has.
static inline int64_t groups_touched(const GroupCursor& cursor, int64_t count) {
  const int64_t beyond = count - cursor.left;  // columns after this group
  int64_t touched = beyond <= 0 ? 1 : 2;
  if (beyond > cursor.group_size) touched += (beyond - 1) / cursor.group_size;
  return std::min(touched, cursor.groups - cursor.group);
}

// For Lanes, which count groups from the cursor's: a column d columns after the second group's first belongs to group
// 1 + floor(d / group_size). Half a column more keeps the quotients away from whole numbers. Before the second group
// the floor is -1 however far: a bound on the distance keeps it exact in float32.
static inline int columns_to_second_group(const GroupCursor& cursor) {
  return static_cast<int>(std::min<int64_t>(cursor.left, 1 << 20));
}

}  // namespace squish::cpu
