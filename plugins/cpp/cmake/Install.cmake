# What `cmake --install` puts where: headers, libraries, the package's configuration for CMake and for pkg-config.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(GQA_PACKAGE "${CMAKE_INSTALL_LIBDIR}/cmake/gqa_export")
set_target_properties(gqa_core PROPERTIES EXPORT_NAME core)
set_target_properties(gqa_runtime PROPERTIES EXPORT_NAME runtime)
set_target_properties(gqa_c PROPERTIES EXPORT_NAME c)
set(GQA_INSTALLED gqa_core gqa_runtime gqa_c)
if(NOT GQA_WITHOUT_TENSORRT)
  set_target_properties(gqa_export PROPERTIES EXPORT_NAME export)
  list(APPEND GQA_INSTALLED gqa_export)
  install(TARGETS gqa_plugin LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
  install(TARGETS gqa_generate RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
install(TARGETS ${GQA_INSTALLED} EXPORT gqa_exportTargets
        ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY gqa/core gqa/cuda gqa/runtime gqa/c DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/gqa"
        FILES_MATCHING PATTERN "*.h")
install(FILES gqa_export.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT gqa_exportTargets NAMESPACE gqa:: DESTINATION "${GQA_PACKAGE}")

configure_package_config_file(cmake/gqa_exportConfig.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/gqa_exportConfig.cmake"
                              INSTALL_DESTINATION "${GQA_PACKAGE}")
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/gqa_exportConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/gqa_exportConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/gqa_exportConfigVersion.cmake" DESTINATION "${GQA_PACKAGE}")
configure_file(cmake/gqa_export.pc.in "${CMAKE_CURRENT_BINARY_DIR}/gqa_export.pc" @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/gqa_export.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
